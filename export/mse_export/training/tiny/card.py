"""The bundle's model card, written from the report alone: no figure in it is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_card"]

_HEAD = """# tiny

The built-in bundle of mse-runtime: a language model of {parameters} M parameters (LLaMA's
architecture, width 192, 4 layers, vocabulary {vocabulary:,}) and an adapter of {adapter} M, made by
one command from words and drawings. English. Two tasks: `sentiment` (-3.0..+3.0) and `emotion`
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
  expressions, clearly shown; espeak-ng speech with emotional prosody; nothing of espeak-ng is
  shipped) went through the runtime's own extractors: `lld13/1` and `face167/1`.
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


def _actors(found: Mapping[str, Any]) -> list[str]:
    return [
        "## On synthetic actors it never met",
        "",
        f"{found['clips']} clips rendered to .mp4, of {found['identities']} actors with",
        "voices, faces and sentences of no training clip, read by the runtime (GGUF as shipped,",
        "adapter and face networks under ONNX Runtime). Brackets: 95 % bootstrap interval over",
        f"actors. {found['contradicted']} clips have media that turn the words' sign around (of",
        f"them {found['sarcastic']} sarcastic); {found['emotion_clips']} have an emotion label.",
        "",
        *_conditions(found["conditions"]),
        "",
        *_baselines(found),
        '"Both media missing" is what the runtime does for a clip without sound and face;',
        '"average" puts the training clips\' mean in every row; "shuffled" gives each clip another',
        "actor's face and voice. The same kind of drawing made training and test clips, which",
        "flatters every figure of this table. What was aimed at: correlation 0.85, Acc-2 0.88, the",
        "sign against the words 0.75.",
        "",
    ]


def _baselines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"Baselines: VADER's own value of the words correlates {found['words_r']:.2f} with the",
        f"label; always saying the commonest emotion is right in {found['emotion_majority']:.2f}.",
    ]


def _faint(found: Mapping[str, Any]) -> list[str]:
    return [
        "## On actors who show less",
        "",
        "The figures above owe something to how clearly the actors show what they feel: every",
        "face's action units are exaggerated by 0 to 30 %. Here they are scaled by",
        f"{found['strength']:.2f}, with labels as if they were not: {found['clips']} clips of"
        f" {found['identities']} other actors,",
        f"{found['contradicted']} with media against the words. No such clip was trained on.",
        "",
        *_conditions(found["conditions"]),
        "",
        *_baselines(found),
        "",
    ]


def _portrait(found: Mapping[str, Any]) -> list[str]:
    return [
        "## On a held-out generator",
        "",
        "No drawing here: one photograph (matplotlib's sample, a public-domain portrait of the",
        "United States Navy), warped by the same action units to the same seven expressions, with",
        f"{found['identities']} sets of proportions, light and voices never trained on;",
        f"{found['clips']} clips, {found['contradicted']} with media against the words. Everything",
        "else as above. One photograph is one person, whatever is done to her proportions: the",
        "brackets do not cover what another face would give.",
        "",
        *_conditions(found["conditions"]),
        "",
        *_worse(found["conditions"]),
        *_baselines(found),
        "",
    ]


def _worse(table: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Says so where a face and a voice do harm."""
    words, whole = table["text only (both media missing)"], table["all"]
    if whole["emotion"][0] >= words["emotion"][0]:
        return []
    return [
        "**Emotions come out worse here with face and voice than from the words alone**: which",
        "negative or neutral face it is does not carry over from drawings, only good from bad.",
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


def _seeds(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Mean and range over seeds, a cell per measure."""
    cells = []
    for key in ("r", "mae", "acc2", "against", "emotion_accuracy"):
        values = [row[key] for row in rows.values()]
        mean = sum(values) / len(values)
        cells.append(f"{mean:.3f} ({min(values):.2f} to {max(values):.2f})")
    return [*cells, str(len(values))]


def _ablations(found: Mapping[str, Any] | None) -> list[str]:
    if not found or not found["table"]:
        return []
    head = [
        "| | correlation | MAE | Acc-2 | against the words | emotion | seeds |",
        "|---|---|---|---|---|---|---|",
    ]

    def rows(table: Mapping[str, Any]) -> list[str]:
        return [f"| {name} | " + " | ".join(_seeds(row)) + " |" for name, row in table.items()]

    return [
        "## Ablations",
        "",
        f"On the {found['clips']} validation clips (of {found['identities']} actors not in",
        "training; the voices are those of training), read by the training code. All adapters were",
        f"fitted alike: encoders warmed up for {found['warm_up']} steps, then {found['steps']}",
        f"steps of {found['batch']} clips, less than the bundle's, so the first row is below it.",
        "Mean and range over seeds.",
        "",
        *head,
        *rows(found["table"]),
        "",
        "The same adapters as in the first row, with less to go by:",
        "",
        *head,
        *rows(found["inputs"]),
        "",
        *_verdict(found["table"]),
        "",
    ]


def _verdict(table: Mapping[str, Any]) -> list[str]:
    """Which variants lie outside the first row's range over seeds."""
    first, *others = table.items()
    known = [row["r"] for row in first[1].values()]
    apart = [
        name
        for name, rows in others
        if all(not min(known) <= row["r"] <= max(known) for row in rows.values())
        and len({row["r"] > max(known) for row in rows.values()}) == 1
    ]
    if not apart:
        return ["No variant's correlation lies outside the first row's range with every seed."]
    return [
        "Correlation outside the first row's range with every seed: " + ", ".join(apart) + ".",
        "The others make no difference that these seeds can tell from chance.",
    ]


def _missing(report: Mapping[str, Any]) -> list[str]:
    out = [
        "- Real people in training: nothing here says how well it reads them, and there is reason",
        "  to expect that the voice's part does not transfer at all.",
        "- Another synthesiser: espeak-ng spoke all sentences, those of the photograph too.",
    ]
    out += [f"- {note}" for note in report.get("notes", [])]
    if not report.get("ablations"):
        out.append("- Ablations: not run for this card (`mse-train tiny --until ablate`).")
    if not report.get("meld"):
        out.append("- MELD: not reported (its files were not given).")
    return out


def _times(times: Mapping[str, float] | None) -> list[str]:
    if not times:
        return []
    stages = ("vocabulary", "text", "slots", "clips", "adapter", "bundle", "evaluate")
    known = {name: times.get(name, 0.0) / 60 for name in stages}
    parts = ", ".join(f"{name} {took:.0f}" for name, took in known.items() if took >= 0.5)
    return [
        f"Time: {sum(known.values()):.0f} minutes ({parts}; `clips` is what was left of",
        "the drawing when the language model was done).",
        "",
    ]


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """Write the card from a report."""
    language = report["language"]
    lines = [
        _HEAD.format(
            parameters=report["parameters"],
            adapter=report["adapter_parameters"],
            vocabulary=report["vocabulary"],
            training_clips=report["training_clips"],
            training_identities=report["training_identities"],
        ),
        "The language model alone, on unseen sentences of the grammar: correlation with VADER",
        f"{language['r']:.2f}, MAE {language['mae']:.2f}, emotion accuracy "
        f"{language['emotion_accuracy']:.2f}.",
        "",
        *_times(report.get("times")),
        *_actors(report["test"]),
        *_faint(report["faint"]),
        *_portrait(report["portrait"]),
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
