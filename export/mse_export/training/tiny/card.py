"""The bundle's model card, written from the report alone: no figure in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_card"]

_HEAD = """# tiny

The built-in bundle of mse-runtime: a language model of {parameters} M parameters (LLaMA's
architecture, width 192, 4 layers, vocabulary 4,096) and an adapter of {adapter} M, made by one
command from words and drawings. English. Two tasks: `sentiment` (-3.0..+3.0) and `emotion`
(neutral, surprise, fear, sadness, joy, disgust, anger).

**For** trying the runtime, testing it, and teaching how an MSE-Adapter works. **Not for** judging
people: no human being's face, voice or words were in its training, its labels follow rules that we
made up, and on real recordings it is close to guessing (see below).

## How it was made

`mse-train tiny` (`mse-train tiny --help` names the stages).

- Sentences of a grammar over the VADER lexicon (MIT licence) and word lists of our own; a
  sentence's valence is VADER's compound value times 3. Half of the sentences are neutral.
- The language model learned to rate sentences (with auxiliary losses on single words), then to
  read noisy vectors in the pseudo tokens' places. **Part of the fusion was thus learned by the
  backbone**, not by the adapter, before it was frozen and written as a 16-bit GGUF.
- {training_clips} clips of {training_identities} synthetic actors (a drawn 3-D head with FACS
  expressions; espeak-ng speech with emotional prosody; nothing of espeak-ng is shipped) went
  through the runtime's own extractors: `lld13/1` and `face167/1`.
- Labels: text and face carry valence, the voice carries arousal, which scales it; praise said
  flatly with a sour face is sarcasm and counts against its words. Emotion is the strongest
  evidence among words, face and voice.
- The adapter (P = 4, both tasks at once) was fitted with modality dropout; temperatures were
  fitted on validation clips. Layout: pseudo-last.
"""


def _share(value: Sequence[float], digits: int = 2) -> str:
    middle, low, high = value
    if any(v is None or math.isnan(v) for v in value):
        return "-"
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _conditions(table: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    out = [
        "| what it is given | correlation | MAE | Acc-2 | sign right against the words | emotion |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        cells = [_share(row[key]) for key in ("r", "mae", "acc2", "against", "emotion")]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return out


def _actors(report: Mapping[str, Any]) -> list[str]:
    return [
        "## On synthetic actors it never met",
        "",
        f"{report['clips']} clips rendered to .mp4, of {report['identities']} actors with",
        "voices, faces and sentences of no training clip, read by the runtime (GGUF as shipped,",
        "adapter and face networks under ONNX Runtime). Brackets: 95 % bootstrap interval over",
        f"actors. {report['contradicted']} clips have media that turn the words' sign around (of",
        f"them {report['sarcastic']} sarcastic); {report['emotion_clips']} have an emotion label.",
        "",
        *_conditions(report["conditions"]),
        "",
        f"Baselines: VADER's own value of the words correlates {report['words_r']:.2f} with the",
        f"label; always saying the commonest emotion is right in {report['emotion_majority']:.2f}.",
        '"Shuffled media" gives each clip another actor\'s face and voice. The same kind of',
        "drawing made training and test clips, which flatters every figure of this table.",
        "What was aimed at: correlation 0.85, Acc-2 0.88, the sign against the words 0.75.",
        "",
    ]


def _meld(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    out = [
        "## On MELD's test utterances (human labels, text only)",
        "",
        f"{found['utterances']} utterances, three classes; thresholds tuned on MELD's dev split,",
        "for tiny and VADER alike. MELD was not used in training. Interval: bootstrap over",
        "utterances.",
        "",
        "| | weighted F1 | accuracy |",
        "|---|---|---|",
    ]
    for name in ("tiny", "tiny, fixed", "VADER", "VADER, fixed", "majority"):
        row = found[name]
        f1 = _share((row["weighted_f1"], row["low"], row["high"]), 3)
        out.append(f"| {name} | {f1} | {row['accuracy']:.3f} |")
    emotion, majority = found["emotion"], found["emotion, majority"]
    return [
        *out,
        "",
        '("fixed": thresholds of -0.15 and +0.15.) Correlation with VADER on these utterances:',
        f"{found['r_with_vader']:.2f}. Seven emotions: weighted F1 {emotion['weighted_f1']:.3f}",
        f"(majority {majority['weighted_f1']:.3f}), accuracy {emotion['accuracy']:.3f}",
        f"({majority['accuracy']:.3f}).",
        "",
    ]


def _real(found: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not found:
        return []
    out = [
        "## On recorded clips, as it is",
        "",
        'The transcript given is "...", so this is what face and voice alone make it say. Nobody',
        "labelled these clips; the answers are shown, not scored. (`synth_` are drawn by another",
        "program than the training clips; `pyfeat_no` shows no human face.)",
        "",
        "| clip | sentiment (± spread) | emotion |",
        "|---|---|---|",
    ]
    for row in found:
        if "error" in row:
            out.append(f"| {Path(row['clip']).stem.split('_')[0]} | refused | |")
            continue
        # File names may name people; the first two words are enough to find the clip.
        name = "_".join(Path(row["clip"]).stem.split("_")[:2])
        value = f"{row['value']:+.2f} ± {row['std']:.2f}"
        out.append(f"| {name} | {value} | {row['emotion']} ({row['probability']:.2f}) |")
    return [*out, ""]


def _ablations(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    out = [
        "## Ablations",
        "",
        f"On the {found['clips']} validation clips (other actors and sentences than in training,",
        "the same voices), read by the training code; one adapter each, "
        f"{found['steps']} steps, seeds {found['seeds']}.",
        "",
        "| adapter | correlation | MAE | Acc-2 | against the words | emotion |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found["table"].items():
        cells = []
        for key in ("r", "mae", "acc2", "against", "emotion_accuracy"):
            values = [row[key] for row in rows]
            cells.append(" / ".join(f"{v:.2f}" for v in values))
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*out, "", "Slashes: one figure per seed.", ""]


def _missing(report: Mapping[str, Any]) -> list[str]:
    out = [
        "- A held-out generator (such as a warped photograph): the same program drew all faces,",
        "  and the same synthesiser spoke all sentences.",
        "- Real people in training: nothing here says how well it reads them, and there is reason",
        "  to expect that the voice's part does not transfer at all.",
    ]
    found = report.get("ablations")
    if not found:
        out.append("- Ablations (no TGM, no MSF, layouts, P, seeds): not run for this card.")
    elif found["seeds"] < 3:
        out.append(f"- Ablations over three seeds: run over {found['seeds']} here, so only large")
        out.append("  differences mean anything.")
    out += [f"- {note}" for note in report.get("notes", [])]
    if not report.get("meld"):
        out.append("- MELD: not reported (its files were not given).")
    return out


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """Write the card from a report."""
    language = report["language"]
    lines = [
        _HEAD.format(
            parameters=report["parameters"],
            adapter=report["adapter_parameters"],
            training_clips=report["training_clips"],
            training_identities=report["training_identities"],
        ),
        "The language model alone, on unseen sentences of the grammar: correlation with VADER",
        f"{language['r']:.2f}, MAE {language['mae']:.2f}, emotion accuracy "
        f"{language['emotion_accuracy']:.2f}.",
        "",
        *_actors(report),
        *_ablations(report.get("ablations")),
        *_meld(report.get("meld")),
        *_real(report.get("real")),
        "## What is missing",
        "",
        *_missing(report),
        "",
        "## Licence",
        "",
        "Apache-2.0. VADER's lexicon (MIT) is not included; it gave the labels.",
        "",
        f"Figures: `{report['command']}`, written by the `card` stage from `report.json`.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
