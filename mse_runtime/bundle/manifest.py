"""Reading `manifest.json`: one clear error per fault, naming the key.

Keys that this minor version of the schema does not know are refused (a misspelt optional key would
otherwise be ignored in silence); a manifest of a newer minor version may have more of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mse_runtime.bundle.node import Node, manifest_error
from mse_runtime.bundle.schema import (
    MANIFEST,
    SCHEMA_VERSION,
    AdapterInfo,
    BackboneInfo,
    Bundle,
    EncoderInfo,
    FeatureInput,
    FeatureInputs,
    FileRef,
    HubRef,
    Label,
    MissingFileError,
    Segment,
    Task,
    TextInput,
    Training,
    VersionError,
)

__all__ = ["parse", "read"]

MAX_BYTES = 4 << 20
MAX_GRID = 2001
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# One number field and nothing that `str.format` could reach further with.
NUMBER_FORMAT = re.compile(r"[^{}]{0,16}\{:[+ ]?(0[1-9])?\.[0-9]f\}[^{}]{0,16}")


def read(folder: Path) -> Bundle:
    """The manifest of the bundle in `folder`; its files are not looked at."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise MissingFileError(
            f"The bundle folder {folder} {what}. Give a folder with a {MANIFEST}, a built-in name, "
            "or org/repo of the Hugging Face hub; mse-doctor lists the built-in bundles."
        )
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise MissingFileError(f"{path} is not a file. Export the bundle again (mse-export).")
        if size > MAX_BYTES:
            raise manifest_error(
                f"is {size:,} bytes long; a manifest has at most {MAX_BYTES:,}", path
            )
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise MissingFileError(
            f"The folder {folder} has no {MANIFEST}, so it is not a bundle. Check --bundle, or "
            "make a bundle with mse-export."
        ) from None
    except OSError as error:
        raise MissingFileError(
            f"{path} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise manifest_error(f"is not UTF-8 text (byte {error.start})", path) from error
    return parse(_json(text, path), source=str(path))


def parse(data: Any, source: str = MANIFEST) -> Bundle:
    """A manifest's JSON values as a `Bundle`; `source` is its name in error messages."""
    root = Node(data, "", source)
    strict = _check_version(root)
    root.strict = strict
    top = root.object(
        "schema_version name version created_by training layout default_task tasks text features "
        "adapter backbone",
        "encoders parity",
    )
    training = top["training"].object("status", "note")
    layout: Literal["published", "pseudo-last"] = top["layout"].choice("published", "pseudo-last")
    features = top["features"].object("audio face")
    tasks = {node.name: _task(node, layout) for node in top["tasks"].entries()}
    default_task = top["default_task"].string()
    if default_task not in tasks:
        top["default_task"].fail(f"should name one of the tasks ({', '.join(tasks) or 'none'})")
    encoders = top.get("encoders")
    parity = top.get("parity")
    bundle = Bundle(
        schema_version=top["schema_version"].string(),
        name=top["name"].string(empty=False),
        version=top["version"].string(empty=False),
        created_by=top["created_by"].string(),
        training=Training(
            status=training["status"].choice("trained", "untrained"),
            note=training["note"].string() if "note" in training else "",
        ),
        layout=layout,
        default_task=default_task,
        tasks=tasks,
        text=_text(top["text"]),
        features=FeatureInputs(_feature(features["audio"]), _feature(features["face"])),
        adapter=_adapter(top["adapter"]),
        backbone=_backbone(top["backbone"]),
        encoders=tuple(_encoder(node) for node in encoders.items()) if encoders else (),
        parity=parity.free() if parity else {},
    )
    _check_agreement(bundle, top)
    return bundle


def _json(text: str, path: Path) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise manifest_error(f"has the key {key!r} twice in one object", path)
            found[key] = value
        return found

    def no_constant(name: str) -> Any:
        raise manifest_error(f"contains {name}, which is not JSON", path)

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise manifest_error(f"is not valid JSON ({error.msg}, {where})", path) from error
    except RecursionError as error:
        raise manifest_error("is nested too deeply to be a manifest", path) from error
    except ValueError as error:  # an integer of thousands of digits
        raise manifest_error(f"is not valid JSON ({error})", path) from error


def _check_version(root: Node) -> bool:
    """Refuse another major version; True where the minor version is one that is fully known."""
    node = root.peek("schema_version")
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", node.string())
    if not found:
        node.fail('should look like "1.0"')
    major, minor = (int(number) for number in found.groups())
    known_major, known_minor = (int(number) for number in SCHEMA_VERSION.split("."))
    if major != known_major:
        advice = "Update mse-runtime (pip install -U mse-runtime)"
        if major < known_major:
            advice = "Export the bundle again with this version's mse-export"
        raise VersionError(
            f"{root.source} has schema_version {major}.{minor}, but this runtime reads major "
            f"version {known_major} only. {advice}."
        )
    return minor <= known_minor


def _task(node: Node, layout: str) -> Task:
    keys = node.object(
        "kind language prompt max_new_tokens",
        "temperature range step number_format number_scale labels",
    )
    kind: Literal["regression", "classification"]
    kind = keys["kind"].choice("regression", "classification")
    prompt = tuple(_segment(segment) for segment in keys["prompt"].items())
    slots = [segment.slot for segment in prompt if segment.slot]
    order = ["pseudo", "text"] if layout == "published" else ["text", "pseudo"]
    if slots != order:
        keys["prompt"].fail(
            f"should have the slots {' and '.join(order)} once each, in this order, for layout "
            f'"{layout}"; it has {" and ".join(map(str, slots)) or "none"}'
        )
    labels = tuple(_label(label) for label in keys["labels"].items()) if "labels" in keys else ()
    task = Task(
        kind=kind,
        language=keys["language"].string(),
        prompt=prompt,
        max_new_tokens=keys["max_new_tokens"].integer(1, 256),
        temperature=keys["temperature"].number(above=0.0) if "temperature" in keys else 1.0,
        labels=labels,
    )
    if kind == "classification":
        _check_labels(node, labels)
        for name in ("range", "step", "number_format", "number_scale"):
            if name in keys:
                keys[name].fail("belongs to regression tasks only")
        return task
    if labels:
        keys["labels"].fail("should be empty: a regression task has range and step instead")
    if "number_scale" in keys:
        task = replace(task, number_scale=keys["number_scale"].number(above=0.0))
    return _with_grid(task, node)


def _check_labels(node: Node, labels: tuple[Label, ...]) -> None:
    where = node.peek("labels")
    if len(labels) < 2:
        where.fail(f"should have at least two classes; it has {len(labels)}")
    for values in ([label.text for label in labels], [label.name for label in labels]):
        if len(set(values)) < len(values):
            where.fail(f"should have distinct texts and names; they are {', '.join(values)}")


def _with_grid(task: Task, node: Node) -> Task:
    ends = node.peek("range").numbers(2)
    step = node.peek("step").number(above=0.0)
    form = node.peek("number_format").string()
    low, high = ends
    if not low < high:
        node.peek("range").fail("should be [low, high] with low below high")
    count = (high - low) / step + 1
    if count > MAX_GRID or abs(count - round(count)) > 1e-6:
        node.peek("step").fail(
            f"should divide the range {low:g} to {high:g} evenly into at most {MAX_GRID} values"
        )
    if not NUMBER_FORMAT.fullmatch(form):
        node.peek("number_format").fail('should be one number field such as "{:.1f}" or "{:+.1f}"')
    task = replace(task, range=(low, high), step=step, number_format=form)
    # The grid of readout.number_grid, without NumPy.
    values = {task.number_text(round(low + i * step, 10)) for i in range(round(count))}
    if len(values) < round(count):
        node.peek("number_format").fail(f"gives the same text for several steps of {step:g}")
    return task


def _segment(node: Node) -> Segment:
    keys = node.object("", "text slot bos special")
    if ("text" in keys) == ("slot" in keys):
        node.fail("should have either text or slot")
    if "slot" in keys:
        if "bos" in keys or "special" in keys:
            node.fail("should not have bos or special beside a slot")
        slot: Literal["pseudo", "text"] = keys["slot"].choice("pseudo", "text")
        return Segment(slot=slot)
    return Segment(
        text=keys["text"].string(printable=False),
        bos=keys["bos"].boolean() if "bos" in keys else False,
        special=keys["special"].boolean() if "special" in keys else False,
    )


def _label(node: Node) -> Label:
    keys = node.object("text name")
    return Label(keys["text"].string(empty=False), keys["name"].string(empty=False))


def _text(node: Node) -> TextInput:
    keys = node.object("max_tokens", "pad pad_id special normalise")
    return TextInput(
        max_tokens=keys["max_tokens"].integer(1, 1 << 16),
        pad=keys["pad"].choice("left", "none") if "pad" in keys else "none",
        pad_id=keys["pad_id"].integer(0) if "pad_id" in keys else 0,
        special=keys["special"].boolean() if "special" in keys else False,
        normalise=keys["normalise"].choice("none", "nfc") if "normalise" in keys else "none",
    )


def _feature(node: Node) -> FeatureInput:
    keys = node.object("spec dim max_steps", "mean std clip nonfinite")
    dim = keys["dim"].integer(1, 1 << 16)
    for name, other in (("mean", "std"), ("std", "mean")):
        if name in keys and other not in keys:
            keys[name].fail(f"needs {other} beside it")
    std = keys["std"].numbers(dim) if "std" in keys else None
    if std and min(std) <= 0:
        keys["std"].fail("should be above 0 in every column")
    return FeatureInput(
        spec=keys["spec"].string(empty=False),
        dim=dim,
        max_steps=keys["max_steps"].integer(1, 1 << 20),
        mean=keys["mean"].numbers(dim) if "mean" in keys else None,
        std=std,
        clip=keys["clip"].number(above=0.0) if "clip" in keys else None,
        nonfinite=keys["nonfinite"].choice("zero", "refuse") if "nonfinite" in keys else "zero",
    )


def _file(node: Node, suffix: str) -> FileRef:
    keys = node.object("file size sha256", "type")
    return FileRef(
        file=keys["file"].relative_file(suffix),
        size=keys["size"].integer(1),
        sha256=keys["sha256"].sha256(),
        type=keys["type"].string() if "type" in keys else None,
    )


def _adapter(node: Node) -> AdapterInfo:
    sizes = "n_pseudo n_embd audio_dim face_dim audio_hidden face_hidden parameters"
    keys = node.object(f"onnx weights {sizes}")
    onnx, weights = _file(keys["onnx"], ".onnx"), _file(keys["weights"], ".safetensors")
    return AdapterInfo(onnx, weights, *(keys[name].integer(1, 1 << 40) for name in sizes.split()))


def _backbone(node: Node) -> BackboneInfo:
    keys = node.object("arch n_embd n_vocab n_layer gguf", "rope_table")
    rounded: Literal["bf16"] = "bf16"
    return BackboneInfo(
        arch=keys["arch"].string(empty=False),
        n_embd=keys["n_embd"].integer(1, 1 << 20),
        n_vocab=keys["n_vocab"].integer(1, 1 << 24),
        n_layer=keys["n_layer"].integer(1, 1 << 12),
        gguf=_gguf(keys["gguf"]),
        rope_table=keys["rope_table"].choice(rounded) if "rope_table" in keys else None,
    )


def _gguf(node: Node) -> FileRef | HubRef:
    if not (isinstance(node.value, Mapping) and "hub" in node.value and "file" not in node.value):
        return _file(node, ".gguf")
    keys = node.object("hub size sha256", "type")
    hub = keys["hub"].object("repo revision file")
    repo, revision = hub["repo"].string(), hub["revision"].string(empty=False)
    if not REPO.fullmatch(repo):
        hub["repo"].fail('should look like "org/repo"')
    if not re.fullmatch(r"[\w][\w./-]*", revision, re.ASCII) or ".." in revision:
        hub["revision"].fail("should be a commit, tag or branch")
    return HubRef(
        repo=repo,
        revision=revision,
        file=hub["file"].relative_file(".gguf"),
        size=keys["size"].integer(1),
        sha256=keys["sha256"].sha256(),
        type=keys["type"].string() if "type" in keys else None,
    )


def _encoder(node: Node) -> EncoderInfo:
    keys = node.object("id file size sha256", "config")
    encoder_id = keys["id"].string()
    if not encoder_id.startswith(("hf-audio:", "hf-image:")):
        keys["id"].fail('should start with "hf-audio:" or "hf-image:"')
    return EncoderInfo(
        id=encoder_id,
        file=keys["file"].relative_file(".onnx"),
        size=keys["size"].integer(1),
        sha256=keys["sha256"].sha256(),
        config=keys["config"].free() if "config" in keys else {},
    )


def _check_agreement(bundle: Bundle, top: Mapping[str, Node]) -> None:
    """Numbers that the manifest gives twice must agree."""
    adapter, backbone, features = bundle.adapter, bundle.backbone, bundle.features
    node = top["adapter"]
    for name, value, other, expected in (
        ("n_embd", adapter.n_embd, "backbone.n_embd", backbone.n_embd),
        ("audio_dim", adapter.audio_dim, "features.audio.dim", features.audio.dim),
        ("face_dim", adapter.face_dim, "features.face.dim", features.face.dim),
    ):
        if value != expected:
            node.peek(name).fail(f"should equal {other}, which is {expected}")
    if bundle.text.pad_id >= backbone.n_vocab:
        top["text"].peek("pad_id").fail(f"should be below backbone.n_vocab ({backbone.n_vocab})")
