"""Writing a bundle: a folder that appears under its name only when it is whole.

Everything is written into `<target>.partial` beside the target and renamed at the end. After an
error the work folder goes away; after an interrupt or on a full disk it stays if it holds a
language model that the next run can continue.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from mse_export import __version__
from mse_export.adapter_shapes import infer_dims
from mse_export.gguf_write import NOTE, unfinished
from mse_export.model_card import model_card
from mse_export.profiles import Profile, published_rope_table
from mse_runtime.bundle import (
    AdapterInfo,
    BackboneInfo,
    Bundle,
    EncoderInfo,
    FileRef,
    HubRef,
    Training,
)
from mse_runtime.bundle.files import file_sha256
from mse_runtime.errors import BundleError, DeviceError, UsageError

__all__ = ["BackboneFile", "Parts", "WorkFolder", "check_target", "write_bundle"]

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BackboneFile:
    """The language model of a bundle: a GGUF in the work folder, or one on the hub."""

    path: Path
    """Where the file lies now (inside the work folder, unless `hub` is given)."""
    type: str
    """Its quantisation, such as "Q4_0"."""
    hub: HubRef | None = None
    source: str = ""
    """What it was made from, for the model card."""
    licence: str = ""


@dataclass(frozen=True)
class Parts:
    """Everything that `write_bundle` puts together."""

    name: str
    profile: Profile
    state: Mapping[str, Any]
    """Adapter parameters without `Model.`, torch tensors or numpy arrays."""
    backbone: BackboneFile
    training: Training
    precision: str = "fp32"
    """Weights in adapter.onnx: fp32 or fp16. adapter.safetensors is always fp32."""
    encoders: tuple[EncoderInfo, ...] = ()
    parity: Mapping[str, Any] = field(default_factory=dict)


def check_target(target: Path, *, force: bool) -> None:
    """UsageError where a bundle cannot be put at `target`; nothing is made."""
    if target.exists() and not force:
        raise UsageError(
            f"{target} exists already. Choose another folder with -o, or replace it with --force."
        )
    if target.exists() and not (target / MANIFEST).is_file():
        raise UsageError(
            f"{target} is not a bundle (no {MANIFEST}), so --force does not replace it. Choose "
            "another folder with -o."
        )


class WorkFolder:
    """`with WorkFolder(target) as work:` ... `work.commit()` renames it to the target."""

    def __init__(self, target: Path, *, force: bool = False) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.force = force
        self._done = False

    def __enter__(self) -> WorkFolder:
        check_target(self.target, force=self.force)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be created ({error.strerror}). Choose another folder with -o."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._done:
            return
        interrupted = not isinstance(error, Exception) or isinstance(error, DeviceError)
        if not (interrupted and unfinished(self.path)):
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self) -> Path:
        """Rename the work folder to the target; an older bundle is replaced in two renames."""
        for note in self.path.glob("*" + NOTE):
            note.unlink()
        if self.target.exists():
            old = self.target.with_name(self.target.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
            self.path.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.path.rename(self.target)
        self._done = True
        return self.target


def write_bundle(folder: Path, parts: Parts) -> Bundle:
    """Write adapter, manifest and model card into `folder`, where the GGUF already lies.

    Returns the bundle as written (`path` is the folder). Raises BundleError where the parts do not
    fit each other.
    """
    from safetensors.numpy import save

    from mse_export import onnx_graph

    dims = infer_dims({name: tuple(value.shape) for name, value in parts.state.items()})
    arrays = {name: onnx_graph.as_array(value) for name, value in parts.state.items()}
    (folder / "adapter.safetensors").write_bytes(save(arrays, metadata={"format": "pt"}))
    precision: Any = parts.precision
    model = onnx_graph.optimise(onnx_graph.build(arrays, precision))
    onnx_graph.save(model, folder / "adapter.onnx")
    backbone = _backbone_info(folder, parts.backbone, parts.profile)
    if backbone.n_embd != dims.n_embd:
        raise BundleError(
            f"The adapter writes vectors of width {dims.n_embd}, but the language model "
            f"{parts.backbone.path.name} has width {backbone.n_embd}. The checkpoint was trained "
            "for another backbone: give that one with --backbone."
        )
    bundle = Bundle(
        name=parts.name,
        version=__version__,
        created_by=f"mse-export {__version__}",
        training=parts.training,
        layout=parts.profile.layout,
        default_task=parts.profile.default_task,
        tasks=parts.profile.tasks,
        text=parts.profile.text,
        features=parts.profile.features,
        adapter=AdapterInfo(
            onnx=_reference(folder / "adapter.onnx"),
            weights=_reference(folder / "adapter.safetensors"),
            n_pseudo=dims.n_pseudo,
            n_embd=dims.n_embd,
            audio_dim=dims.audio_dim,
            face_dim=dims.video_dim,
            audio_hidden=dims.audio_hidden,
            face_hidden=dims.video_hidden,
            parameters=dims.parameters,
        ),
        backbone=backbone,
        encoders=parts.encoders,
        parity=parts.parity,
        path=folder,
    )
    write_manifest(bundle, parts.backbone)
    return bundle


def write_manifest(bundle: Bundle, backbone: BackboneFile) -> None:
    """Manifest and model card; checked by the runtime's own parser first."""
    from mse_runtime.bundle import manifest

    plain = bundle.to_dict()
    manifest.parse(json.loads(json.dumps(plain)), str(bundle.path / MANIFEST))
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    (bundle.path / MANIFEST).write_text(text, "utf-8")
    card = model_card(bundle, backbone.source, backbone.licence)
    (bundle.path / "README.md").write_text(card, "utf-8")


def with_parity(bundle: Bundle, backbone: BackboneFile, parity: Mapping[str, Any]) -> Bundle:
    """The bundle with the results of `verify` in manifest and model card."""
    updated = replace(bundle, parity=dict(parity))
    write_manifest(updated, backbone)
    return updated


def _backbone_info(folder: Path, backbone: BackboneFile, profile: Profile) -> BackboneInfo:
    from mse_runtime.gguf import Gguf

    with Gguf.open(backbone.path) as header:
        arch, n_embd, n_vocab, n_layer = (
            header.arch,
            header.n_embd,
            header.n_vocab,
            header.n_layer,
        )
    reference: FileRef | HubRef
    if backbone.hub is not None:
        reference = backbone.hub
    else:
        if backbone.path.parent.resolve() != folder.resolve():
            raise UsageError(f"{backbone.path} does not lie in the bundle's folder {folder}.")
        reference = _reference(backbone.path, backbone.type)
    rope_table = published_rope_table(arch) if profile.layout == "published" else None
    return BackboneInfo(arch, n_embd, n_vocab, n_layer, reference, rope_table)


def _reference(path: Path, kind: str | None = None) -> FileRef:
    return FileRef(path.name, path.stat().st_size, file_sha256(path), kind)
