"""From a request to a bundle: backbone, adapter, profile, files, verification, rename."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mse_export import profiles
from mse_export.bundle_writer import BackboneFile, Parts, WorkFolder, with_parity, write_bundle
from mse_export.choices import Choices, Request, choose
from mse_export.gguf_write import check_free_space, claim
from mse_export.profiles import Profile
from mse_export.quant_types import Quant
from mse_export.resolve import Source, fetch
from mse_export.watcher import Watcher
from mse_runtime.bundle import Bundle, EncoderInfo

__all__ = ["Request", "Result", "Watcher", "export"]

GGUF_NAME = "backbone.gguf"


@dataclass(frozen=True)
class Result:
    """The bundle as written, and what a person should know."""

    bundle: Bundle
    path: Path
    warnings: tuple[str, ...]


def export(request: Request, watcher: Watcher | None = None) -> Result:
    """Write a bundle and return it, loaded and verified. Raises MSEError subclasses."""
    watcher = watcher or Watcher()
    choices = choose(request)
    check_disk(choices)
    warnings, adapter, profile = [*choices.warnings], choices.adapter, choices.profile
    source = fetch(choices.source, request.offline, watcher)
    output = choices.output
    with WorkFolder(output, force=request.force) as work:
        gguf = _make_gguf(source, choices.quant, profile, work, request, watcher)
        watcher.stage("Writing adapter and manifest")
        if adapter.profile is None or request.dataset is not None:
            pad_id = _pad_id(source, gguf, profile)
            profile = replace(profile, text=replace(profile.text, pad_id=pad_id))
        profile, encoders = _export_encoders(request, profile, work.path, watcher)
        parts = Parts(
            name=request.name or output.name.removesuffix("-bundle"),
            profile=profile,
            state=adapter.state,
            backbone=gguf,
            training=adapter.training,
            precision=request.onnx_precision,
            encoders=encoders,
            parity={"validation": dict(adapter.validation)} if adapter.validation else {},
        )
        bundle = write_bundle(work.path, parts)
        if request.verify:
            from mse_export.verify import verify

            watcher.stage("Verifying")
            folder = source.path if source.kind == "folder" else None
            report = verify(bundle, folder=folder, threads=request.threads, watcher=watcher)
            warnings += report.warnings
            bundle = with_parity(bundle, gguf, {**bundle.parity, **report.to_dict()})
            report.raise_if_failed()
        path = work.commit()
    return Result(replace(bundle, path=path), path, tuple(warnings))


def check_disk(choices: Choices) -> None:
    """DeviceError where the language model will not fit beside what an earlier run left."""
    work = WorkFolder(choices.output).path
    there = sum(path.stat().st_size for path in work.glob(GGUF_NAME + "*"))
    check_free_space(choices.output.parent, choices.gguf_bytes - there, "The language model")


def _make_gguf(
    source: Source,
    target: Quant | None,
    profile: Profile,
    work: WorkFolder,
    request: Request,
    watcher: Watcher,
) -> BackboneFile:
    path = work.path / GGUF_NAME
    if source.kind == "synthetic" and source.config is not None and target is not None:
        from mse_export.synthetic import write_synthetic

        claim(path, None)
        watcher.stage(f"Writing random weights ({target.name})")
        write_synthetic(
            path,
            source.config,
            target,
            name=source.name,
            seed=request.seed,
            progress=watcher.progress,
        )
    elif source.kind == "gguf" and source.path is not None:
        _adopt_gguf(source.path, path, target, request, watcher)
    elif source.path is not None and target is not None:
        from mse_export.convert import convert_and_quantize

        convert_and_quantize(
            source.path,
            path,
            target,
            round_bf16=profile.layout == "published",
            threads=request.threads,
            watcher=watcher,
        )
    kind = target.name.upper() if target is not None else _gguf_type(path)
    return BackboneFile(path, kind, source=source.description, licence=source.licence)


def _gguf_type(path: Path) -> str:
    from mse_runtime.gguf import Gguf

    with Gguf.open(path) as header:
        return header.weight_type


def _adopt_gguf(
    given: Path, path: Path, target: Quant | None, request: Request, watcher: Watcher
) -> None:
    """A user's own GGUF: copied into the bundle (a link would share changes), or quantised."""
    if target is None or target.base.name == _gguf_type(given):
        claim(path, None)
        watcher.stage("Taking over the GGUF file")
        check_free_space(path.parent, given.stat().st_size, "Copying the GGUF file")
        shutil.copyfile(given, path)
        return
    from mse_export.quantize import quantize

    watcher.stage(f"Quantising to {target.name}")
    quantize(given, path, target, threads=request.threads, progress=watcher.progress)


def _pad_id(source: Source, gguf: BackboneFile, profile: Profile) -> int:
    """The id that pads transcripts: row 0 for Llama and ChatGLM, <|endoftext|> for Qwen."""
    from mse_runtime.gguf import Gguf

    if source.name in profiles.backbone_names():
        return profiles.named_backbone(source.name).pad_id
    with Gguf.open(gguf.path) as header:
        if profiles.family_of(header.arch) != "qwen":
            return 0
        default = header.integer("tokenizer.ggml.eos_token_id", 0)
        return header.integer("tokenizer.ggml.padding_token_id", default)


def _export_encoders(
    request: Request, profile: Profile, folder: Path, watcher: Watcher
) -> tuple[Profile, tuple[EncoderInfo, ...]]:
    """Encoders written into the bundle's folder, and the profile that names them."""
    if request.audio_encoder is None and request.face_encoder is None:
        return profile, ()
    from mse_export.encoders import export_audio_encoder, export_face_encoder, with_encoders

    exported: list[EncoderInfo] = []
    if request.audio_encoder is not None:
        watcher.stage(f"Exporting the encoder {request.audio_encoder.name}")
        exported.append(export_audio_encoder(request.audio_encoder, folder))
    if request.face_encoder is not None:
        watcher.stage(f"Exporting the encoder {request.face_encoder.name}")
        exported.append(export_face_encoder(request.face_encoder, folder))
    features = with_encoders(profile.features, tuple(exported))
    return replace(profile, features=features), tuple(exported)
