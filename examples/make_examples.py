"""Draw and speak the example clips: `python examples/make_examples.py` (needs espeak-ng).

Nothing in them is of a real person: a drawn head, rendered by `mse_export.training.tiny`, and
synthetic speech. Four of them come in pairs that differ in one thing only, so that one can hear
and see what a modality changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mse_export.training.tiny.actors import make_actor, perform, write_mp4
from mse_export.training.tiny.voice import TRAINING_VOICES
from mse_export.training.tiny.world import Media

NEUTRAL, SADNESS, JOY, ANGER = 0, 3, 4, 6

#: file -> (actor's seed, sentence, face and voice)
CLIPS = {
    "happy": (
        23,
        "I am really happy with how this turned out. Thank you so much for everything.",
        Media(JOY, 0.95, JOY, 0.9),
    ),
    "sad": (
        41,
        "I do not want to talk about it. It was a terrible day.",
        Media(SADNESS, 0.95, SADNESS, 0.9),
    ),
    "sarcasm": (
        23,
        "Oh great, that is just wonderful.",
        Media(ANGER, 0.9, SADNESS, 0.8),
    ),
    "smile": (57, "The meeting is on Monday at ten.", Media(JOY, 1.0, NEUTRAL, 0.0)),
    "frown": (57, "The meeting is on Monday at ten.", Media(SADNESS, 1.0, NEUTRAL, 0.0)),
    "lively": (68, "It was a good day and I like the new house.", Media(NEUTRAL, 0.0, JOY, 1.0)),
    "dull": (68, "It was a good day and I like the new house.", Media(NEUTRAL, 0.0, SADNESS, 1.0)),
}


def main(folder: Path) -> None:
    """Write every clip into `folder`; clips of one actor share their seed, so only media differ."""
    for name, (seed, text, media) in CLIPS.items():
        clip = perform(make_actor(seed, TRAINING_VOICES), text, media, seed, clean=True)
        path = folder / f"{name}.mp4"
        write_mp4(path, clip, fps=20, size=320)
        print(f"{path}\t{clip.duration:.1f} s\t{path.stat().st_size} bytes\t{text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
