"""Adapter checkpoints: the published trainer's state dicts and safetensors files.

A published checkpoint is `torch.save` of a state dict whose keys start with `Model.`; buffers of
the frozen language model may stray in and are ignored (published-model spec, section 1.5). Files
are read with `weights_only=True`: a pickle that carries code is refused, and nothing of it runs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mse_export.adapter_shapes import AdapterDims, infer_dims, parameter_shapes
from mse_runtime.errors import BundleError

__all__ = ["Checkpoint", "read_checkpoint"]

ANCHOR = "audio_LSTM.rnn.weight_ih_l0"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's adapter, under published names without the prefix."""

    path: Path
    state: Mapping[str, Tensor]
    """float32, exactly the adapter's parameters."""
    dims: AdapterDims
    ignored: tuple[str, ...]
    """Keys that are not the adapter's, such as buffers of the language model."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What mse-train wrote beside the weights (safetensors metadata), JSON values decoded."""


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read an adapter checkpoint (`.pth`, `.pt`, `.bin` or `.safetensors`).

    Raises BundleError for a missing, foreign, truncated or unsafe file, naming the first parameter
    that is missing or has another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise BundleError(
            f"No checkpoint at {path}. Give the file that the published trainer or mse-train "
            "saved, or make an untrained adapter with --init random."
        )
    raw, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    prefix = _prefix(raw, path)
    state = {
        name.removeprefix(prefix): value for name, value in raw.items() if name.startswith(prefix)
    }
    dims = infer_dims({name: tuple(value.shape) for name, value in state.items()}, str(path))
    wanted = parameter_shapes(dims)
    kept: dict[str, Tensor] = {}
    for name in wanted:
        value = state[name].detach().to(torch.float32).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise BundleError(
                f"{path}: parameter {name!r} holds NaN or infinity, so training diverged. Use an "
                "earlier checkpoint."
            )
        kept[name] = value
    ignored = tuple(name for name in raw if name.removeprefix(prefix) not in wanted)
    return Checkpoint(path, kept, dims, ignored, metadata)


def _prefix(raw: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the adapter's names: `Model.` in published files, nothing in ours."""
    for name in raw:
        if name == ANCHOR or name.endswith("." + ANCHOR):
            return name.removesuffix(ANCHOR)
    infer_dims({name: tuple(value.shape) for name, value in raw.items()}, str(path))
    raise AssertionError("infer_dims names what is missing")


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # Checked here, since torch takes any text for a pickle and answers with its error codes.
    with path.open("rb") as file:
        if not file.read(4).startswith((b"PK", b"\x80")):
            raise _unreadable(path, ValueError("it is not a file of torch.save"))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{path} is a pickle that contains more than tensors, so opening it could run code. It "
            "was refused and nothing in it was executed. Save the state dict alone: "
            "torch.save(model.state_dict(), FILE)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise BundleError(
            f"{path} holds a {type(loaded).__name__}, not a state dict. Save the adapter with "
            "torch.save(model.state_dict(), FILE)."
        )
    return {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return tensors, {key: _decoded(value) for key, value in metadata.items()}


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _unreadable(path: Path, error: Exception) -> BundleError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return BundleError(
        f"{path} cannot be read as a checkpoint ({reason}). The file is truncated or of another "
        "kind: copy it again, or save it again from the trainer."
    )
