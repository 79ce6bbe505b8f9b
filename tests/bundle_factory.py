"""A small, complete bundle for tests: a toy GGUF, a random adapter and its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernel_cases import random_weights
from make_fixtures import toy_gguf
from safetensors.numpy import save_file

from mse_runtime.gguf import Gguf

WIDTH, AUDIO, FACE, HIDDEN, N_PSEUDO = 64, 13, 167, (32, 16), 4


def file_ref(path: Path) -> dict[str, Any]:
    """A `FileRef` of the manifest for the file as it is now."""
    data = path.read_bytes()
    return {
        "file": path.name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def make_bundle(
    folder: Path, *, seed: int = 0, onnx: bool = False, arch: str = "llama"
) -> dict[str, Any]:
    """Write a bundle into `folder` and return its manifest.

    Without `onnx` the ONNX file holds no graph: enough where only its bytes matter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(
        seed, audio_dim=AUDIO, video_dim=FACE, hidden=HIDDEN, width=WIDTH, n_pseudo=N_PSEUDO
    )
    save_file(weights, folder / "adapter.safetensors")
    if onnx:
        from mse_export import onnx_graph

        graph = onnx_graph.build(weights).SerializeToString()
    else:
        graph = b"no graph" * 100
    (folder / "adapter.onnx").write_bytes(graph)
    toy_gguf(folder / "backbone.gguf", arch, n_embd=WIDTH, n_layer=1, seed=seed)
    (folder / "README.md").write_text("# a model card\n")
    document = manifest(folder)
    write_manifest(folder, document)
    return document


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the files in `folder`."""
    with Gguf.open(folder / "backbone.gguf") as header:
        backbone = {
            "arch": header.arch,
            "n_embd": header.n_embd,
            "n_vocab": header.n_vocab,
            "n_layer": header.n_layer,
        }
    question = [{"text": "Rate:", "bos": True}, {"slot": "text"}, {"slot": "pseudo"}]
    return {
        "schema_version": "1.0",
        "name": "toy",
        "version": "0.1.0",
        "created_by": "tests",
        "training": {"status": "untrained", "note": "random"},
        "layout": "pseudo-last",
        "default_task": "sentiment",
        "tasks": {
            "sentiment": {
                "kind": "regression",
                "language": "en",
                "range": [-3.0, 3.0],
                "step": 0.1,
                "number_format": "{:+.1f}",
                "prompt": [*question, {"text": " The sentiment is"}],
                "max_new_tokens": 4,
            },
            "emotion": {
                "kind": "classification",
                "language": "en",
                "labels": [{"text": "0", "name": "neutral"}, {"text": "1", "name": "joy"}],
                "prompt": [*question, {"text": " The emotion is"}],
                "max_new_tokens": 1,
            },
        },
        "text": {"max_tokens": 20, "pad": "left", "pad_id": 0},
        "features": {
            "audio": {
                "spec": "lld13/1",
                "dim": AUDIO,
                "max_steps": 200,
                "mean": [0.5] * AUDIO,
                "std": [2] * AUDIO,
                "clip": 5.0,
            },
            "face": {"spec": "face167/1", "dim": FACE, "max_steps": 40, "nonfinite": "refuse"},
        },
        "adapter": {
            "onnx": file_ref(folder / "adapter.onnx"),
            "weights": file_ref(folder / "adapter.safetensors"),
            "n_pseudo": N_PSEUDO,
            "n_embd": WIDTH,
            "audio_dim": AUDIO,
            "face_dim": FACE,
            "audio_hidden": HIDDEN[0],
            "face_hidden": HIDDEN[1],
            "parameters": 123_456,
        },
        "backbone": {**backbone, "gguf": {**file_ref(folder / "backbone.gguf"), "type": "F32"}},
        "encoders": [],
        "parity": {"anything": [1, {"goes": None}]},
    }


def write_manifest(folder: Path, document: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def edit(folder: Path, key: str, value: Any) -> None:
    """Set the dotted `key` of the manifest; `...` removes it."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    set_key(document, key, value)
    write_manifest(folder, document)


def set_key(document: Any, key: str, value: Any) -> None:
    """Set the dotted `key` in a manifest; numbers index lists and `...` removes the key."""
    *parents, last = key.split(".")
    for part in parents:
        document = document[int(part) if isinstance(document, list) else part]
    if value is ...:
        del document[last]
    else:
        document[int(last) if isinstance(document, list) else last] = value


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, to see that nothing was written."""
    pick: Callable[[Path], bool] = Path.is_file
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if pick(p)}
