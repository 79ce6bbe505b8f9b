"""From a request to a bundle: backbone, adapter, profile, files, verification, rename."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mse_export import profiles
from mse_export.adapter_shapes import AdapterDims
from mse_export.bundle_writer import BackboneFile, Parts, WorkFolder, with_parity, write_bundle
from mse_export.gguf_write import check_free_space, claim
from mse_export.profiles import Layout, Profile
from mse_export.quant_types import Quant, quant
from mse_export.resolve import Source, resolve_backbone
from mse_export.watcher import Watcher
from mse_runtime.bundle import Bundle, EncoderInfo, Training
from mse_runtime.errors import BundleError, UsageError

__all__ = ["Request", "Result", "Watcher", "export"]

GGUF_NAME = "backbone.gguf"


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    backbone: str
    output: Path | None = None
    dataset: str | None = None
    adapter: Path | None = None
    init: Literal["random"] | None = None
    seed: int = 0
    quant: str = "auto"
    layout: Layout | None = None
    name: str | None = None
    synthetic: bool = False
    onnx_precision: Literal["fp32", "fp16"] = "fp32"
    audio_encoder: Path | None = None
    face_encoder: Path | None = None
    verify: bool = True
    force: bool = False
    offline: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """The bundle as written, and what a person should know."""

    bundle: Bundle
    path: Path
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Adapter:
    state: Mapping[str, Any]
    dims: AdapterDims
    training: Training
    profile: Profile | None = None
    """What mse-train wrote beside the weights."""
    validation: Mapping[str, Any] = field(default_factory=dict)


def export(request: Request, watcher: Watcher | None = None) -> Result:
    """Write a bundle and return it, loaded and verified. Raises MSEError subclasses."""
    watcher = watcher or Watcher()
    warnings: list[str] = []
    source = resolve_backbone(
        request.backbone, synthetic=request.synthetic, offline=request.offline
    )
    shape = _Shape.of(source)
    checkpoint = _read_adapter(request, warnings)
    profile = choose_profile(request, shape.arch, checkpoint, warnings)
    profile = _encoder_dims(request, profile)
    dims = profile.dims(shape.n_embd)
    if checkpoint is None:
        from mse_export.adapter import init_random

        note = f"random initialisation, seed {request.seed}"
        state: Mapping[str, Any] = init_random(dims, request.seed).state_dict()
        adapter = _Adapter(state, dims, Training("untrained", note))
    else:
        adapter = checkpoint
        _check_fit(adapter.dims, dims, source, profile)
    target_quant = _choose_quant(request.quant, shape, source)
    output = request.output or Path(f"{source.name}-{profile.dataset or 'clips'}-bundle")

    with WorkFolder(output, force=request.force) as work:
        gguf = _make_gguf(source, target_quant, profile, work, request, watcher)
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


@dataclass(frozen=True)
class _Shape:
    """What must be known of a backbone before anything large is written."""

    arch: str
    n_embd: int
    parameters: int

    @classmethod
    def of(cls, source: Source) -> _Shape:
        from mse_export.backbones import architecture

        if source.kind == "gguf" and source.path is not None:
            from mse_runtime.gguf import Gguf

            with Gguf.open(source.path) as header:
                count = sum(tensor.elements for tensor in header.tensors.values())
                return cls(header.arch, header.n_embd, count)
        config = source.config
        if config is None and source.path is not None:
            from mse_export.hf_folder import read_config

            config = read_config(source.path)
        module = architecture(config or {})
        recipes = module.tensors(config or {})
        width = module.metadata(config or {})["embedding_length"]
        return cls(module.ARCH, width, sum(recipe.elements for recipe in recipes))


def _read_adapter(request: Request, warnings: list[str]) -> _Adapter | None:
    if request.adapter is not None and request.init is not None:
        raise UsageError("Give either --adapter or --init random, not both.")
    if request.adapter is None:
        if request.init is None:
            raise UsageError(
                "No adapter was given and none is known for this backbone. Give a checkpoint of "
                "the published trainer or of mse-train with --adapter FILE, train one (mse-train "
                "--help), or make an untrained one for benchmarks with --init random --seed N."
            )
        return None
    from mse_export.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(request.adapter)
    if checkpoint.ignored:
        warnings.append(
            f"{len(checkpoint.ignored)} keys of the checkpoint are not the adapter's and were "
            f"ignored (first: {checkpoint.ignored[0]})."
        )
    from mse_export.training.about import profile_from_metadata

    about = checkpoint.metadata
    said = about.get("training") if isinstance(about.get("training"), dict) else {}
    validation = about.get("validation")
    return _Adapter(
        checkpoint.state,
        checkpoint.dims,
        Training(
            "trained", str((said or {}).get("note") or f"weights from {request.adapter.name}")
        ),
        profile_from_metadata(about),
        validation if isinstance(validation, dict) else {},
    )


def choose_profile(
    request: Request, arch: str, adapter: _Adapter | None, warnings: list[str]
) -> Profile:
    """The profile: asked for, or guessed from the adapter's widths, or ours for raw clips."""
    family = profiles.family_of(arch)
    if request.dataset is None and adapter is not None and adapter.profile is not None:
        if request.layout not in (None, adapter.profile.layout):
            raise UsageError(
                f"The adapter was trained with the layout {adapter.profile.layout!r}; another one "
                "would not fit it. Leave --layout out."
            )
        return adapter.profile
    if request.dataset == "clips" or (request.dataset is None and request.layout == "pseudo-last"):
        return _ours(family, adapter)
    dataset = request.dataset
    if dataset is None:
        if adapter is None:
            if request.layout == "published":
                raise UsageError("--layout published needs --dataset.")
            return _ours(family, None)
        plain = profiles.ours(family)
        if (plain.features.audio.dim, plain.features.face.dim) == (
            adapter.dims.audio_dim,
            adapter.dims.video_dim,
        ):
            return _ours(family, adapter)
        guesses = profiles.guess_datasets(family, adapter.dims)
        if not guesses:
            raise BundleError(
                f"The checkpoint takes {adapter.dims.audio_dim} audio and {adapter.dims.video_dim} "
                "face columns, which fits none of the known data sets. Name one with --dataset."
            )
        dataset = guesses[0]
        others = f" ({', '.join(guesses[1:])} would fit too)" if guesses[1:] else ""
        warnings.append(
            f"The checkpoint does not say its data set; its widths ({adapter.dims.audio_dim}, "
            f"{adapter.dims.video_dim}) are {dataset}'s{others}. Say --dataset to be sure."
        )
    if request.layout == "pseudo-last":
        raise UsageError(
            "Published data sets were trained with the published layout; pseudo-last is for "
            "adapters trained with mse-train (leave --dataset out)."
        )
    profile = profiles.published(family, dataset, 0)
    if adapter is None:
        return profile
    dims = adapter.dims
    return replace(
        profile,
        audio_hidden=dims.audio_hidden,
        face_hidden=dims.video_hidden,
        n_pseudo=dims.n_pseudo,
    )


def _ours(family: str, adapter: _Adapter | None) -> Profile:
    profile = profiles.ours(family)
    if adapter is None:
        return profile
    dims = adapter.dims
    return replace(
        profile,
        audio_hidden=dims.audio_hidden,
        face_hidden=dims.video_hidden,
        n_pseudo=dims.n_pseudo,
    )


def _check_fit(found: AdapterDims, wanted: AdapterDims, source: Source, profile: Profile) -> None:
    if found.n_embd != wanted.n_embd:
        raise BundleError(
            f"The checkpoint writes vectors of width {found.n_embd}, but {source.name} has width "
            f"{wanted.n_embd}: it was trained for another backbone. Give that one with --backbone."
        )
    if (found.audio_dim, found.video_dim) != (wanted.audio_dim, wanted.video_dim):
        raise BundleError(
            f"The checkpoint takes {found.audio_dim} audio and {found.video_dim} face columns, but "
            f"{profile.name} has {wanted.audio_dim} and {wanted.video_dim}. Give the data set that "
            "it was trained on with --dataset."
        )


def _choose_quant(name: str, shape: _Shape, source: Source) -> Quant | None:
    """The quantisation; None keeps a GGUF as it is."""
    if name != "auto":
        return quant(name)
    if source.kind == "gguf":
        return None
    if shape.parameters < 100_000_000:
        return quant("f16")
    return quant("q8_0" if shape.parameters < 1_000_000_000 else "q4_0")


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


def _encoder_dims(request: Request, profile: Profile) -> Profile:
    """The profile with the widths of the encoders that were asked for."""
    folders = (request.audio_encoder, request.face_encoder)
    if folders == (None, None):
        return profile
    from mse_export.encoders import encoder_width

    audio, face = profile.features.audio, profile.features.face
    if folders[0] is not None:
        audio = replace(audio, dim=encoder_width(folders[0]))
    if folders[1] is not None:
        face = replace(face, dim=encoder_width(folders[1]))
    return replace(profile, features=replace(profile.features, audio=audio, face=face))


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
