"""Synthetic actors and the labels of their world."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vaderSentiment")
pytest.importorskip("matplotlib")

from mse_export.training.tiny.drawing import Pose, draw, random_look
from mse_export.training.tiny.head import (
    EXPRESSIONS,
    deform,
    identity_shape,
    topology,
)
from mse_export.training.tiny.lexicon import EMOTIONS
from mse_export.training.tiny.world import (
    Media,
    draw_media,
    fused_emotion,
    fused_sentiment,
    is_sarcasm,
)

JOY, SADNESS, ANGER = EMOTIONS.index("joy"), EMOTIONS.index("sadness"), EMOTIONS.index("anger")
needs_speech = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")


def test_the_head_is_symmetric_and_its_units_too() -> None:
    top = topology()
    assert (top.mirror[top.mirror] == np.arange(468)).all()
    for unit, field in top.units.items():
        np.testing.assert_allclose(
            field, field[top.mirror] * [-1, 1, 1], atol=1e-9, err_msg=str(unit)
        )


def test_a_smile_lifts_the_corners_and_a_frown_lowers_them() -> None:
    base = topology().base
    smile, frown = deform(base, EXPRESSIONS[JOY]), deform(base, EXPRESSIONS[SADNESS])
    assert smile[61, 1] < base[61, 1] < frown[61, 1]


def test_the_extractor_sees_the_drawn_face_and_its_smile() -> None:
    from mse_runtime.features.face import FaceExtractor
    from mse_runtime.features.spec import get_spec

    spec = get_spec("face167/1")
    difference = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shape, look = identity_shape(rng), random_look(rng)
        found = []
        for expression in (JOY, SADNESS):
            extractor = FaceExtractor()
            for k in range(3):
                picture = draw(
                    deform(shape, EXPRESSIONS[expression]), look, Pose(scale=60), 240, rng
                )
                extractor.add(picture, k / 5)
            track = extractor.finish().track
            assert track.valid.all()
            found.append(track.values.mean(0))
        difference.append(found[0] - found[1])
    smile = [name for name in spec.names if "12" in name and "AU" in name.upper()]
    assert smile
    assert np.mean(difference, 0)[spec.index(smile[0])] > 0


def test_every_modality_moves_the_label() -> None:
    smiling, sour = Media(JOY, 1.0), Media(SADNESS, 1.0)
    assert fused_sentiment(0.0, smiling) > 0.5 > -0.5 > fused_sentiment(0.0, sour)
    lively, dull = Media(voice=JOY, voice_intensity=1.0), Media(voice=SADNESS, voice_intensity=1.0)
    assert fused_sentiment(1.5, lively) > fused_sentiment(1.5, Media()) > fused_sentiment(1.5, dull)
    assert fused_sentiment(-1.5, lively) < fused_sentiment(-1.5, dull)


def test_sarcasm_turns_praise_around_and_only_praise() -> None:
    media = Media(ANGER, 0.8, SADNESS, 0.8)
    assert is_sarcasm(1.5, media)
    assert fused_sentiment(1.5, media) < fused_sentiment(0.0, media)
    assert not is_sarcasm(-1.5, media)
    assert not is_sarcasm(1.5, media.without(voice=True))
    assert fused_emotion(JOY, 1.5, media) == ANGER


def test_a_missing_modality_leaves_the_words() -> None:
    media = Media(ANGER, 1.0, JOY, 1.0).without(face=True, voice=True)
    assert fused_sentiment(1.2, media) == pytest.approx(1.2)
    assert fused_emotion(JOY, 1.2, media) == JOY


def test_media_disagree_with_words_often() -> None:
    rng = random.Random(0)
    opposed = [draw_media(rng, 1.5, JOY).valence < -0.5 for _ in range(500)]
    assert 0.2 < np.mean(opposed) < 0.7


@needs_speech
def test_lively_speech_is_louder_and_quicker_than_dull_speech() -> None:
    from mse_export.training.tiny.voice import TRAINING_VOICES, random_speaker, speak

    rng = np.random.default_rng(0)
    speaker = random_speaker(rng, TRAINING_VOICES)
    text = "The meeting is on Monday at ten."
    lively = speak(text, speaker, JOY, 1.0, rng, clean=True).astype(float)
    dull = speak(text, speaker, SADNESS, 1.0, rng, clean=True).astype(float)
    assert np.sqrt((lively**2).mean()) > 1.5 * np.sqrt((dull**2).mean())
    assert len(dull) > 1.1 * len(lively)


@needs_speech
def test_a_performance_becomes_a_file_the_runtime_reads(tmp_path: Path) -> None:
    from mse_export.training.tiny.actors import make_actor, perform, write_mp4
    from mse_export.training.tiny.voice import TRAINING_VOICES
    from mse_runtime.features.extract import extract

    clip = perform(make_actor(7, TRAINING_VOICES), "Hello there.", Media(JOY, 1.0), 7)
    again = perform(make_actor(7, TRAINING_VOICES), "Hello there.", Media(JOY, 1.0), 7)
    np.testing.assert_array_equal(clip.audio, again.audio)
    write_mp4(tmp_path / "clip.mp4", clip, fps=10, size=240)
    found = extract(tmp_path / "clip.mp4", threads=1)
    assert found.audio is not None
    assert found.face is not None
    assert found.face.valid.mean() > 0.9


def test_the_photograph_shows_the_same_expressions() -> None:
    from mse_export.training.tiny.portrait import Person
    from mse_runtime.features.face import FaceExtractor
    from mse_runtime.features.spec import get_spec

    names = list(get_spec("face167/1").names)
    rng = np.random.default_rng(0)
    person = Person(5)
    read = {}
    for emotion in ("neutral", "surprise", "sadness", "joy"):
        extractor = FaceExtractor(threads=1)
        units = EXPRESSIONS[EMOTIONS.index(emotion)]
        extractor.add(person(units, Pose(yaw=0.02), rng), 0.0)
        track = extractor.finish().track
        assert track.valid.all()
        read[emotion] = dict(zip(names, track.values[0], strict=True))
    assert read["joy"]["AU12"] > read["neutral"]["AU12"] > read["sadness"]["AU12"] - 0.2
    assert read["surprise"]["AU26"] > read["neutral"]["AU26"]
    assert read["sadness"]["AU15"] > read["neutral"]["AU15"]
    # Another seed is another light and other proportions.
    other = Person(6)({}, Pose(), np.random.default_rng(0))
    assert np.abs(other.astype(int) - person({}, Pose(), np.random.default_rng(0))).mean() > 2
