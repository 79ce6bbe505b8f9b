"""What an export will be, decided and checked before anything large is fetched or written.

Everything here looks at options, small files and headers only, so that a mistake costs seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mse_export import profiles
from mse_export.adapter_shapes import AdapterDims
from mse_export.backbones import TensorRecipe
from mse_export.bundle_writer import check_target
from mse_export.profiles import Layout, Profile
from mse_export.quant_types import Quant, Shape, file_bytes, quant, tensor_types
from mse_export.resolve import Source, find_backbone
from mse_runtime.bundle import Training
from mse_runtime.errors import BundleError, UsageError

__all__ = ["Choices", "Request", "choose"]


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
class Adapter:
    state: Mapping[str, Any]
    dims: AdapterDims
    training: Training
    profile: Profile | None = None
    """What mse-train wrote beside the weights."""
    validation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """A request with every default filled in."""

    source: Source
    adapter: Adapter
    profile: Profile
    quant: Quant | None
    """None keeps a GGUF as it is."""
    output: Path
    gguf_bytes: int
    """Size of the language model's file, predicted from its tensor table."""
    warnings: tuple[str, ...]


def choose(request: Request) -> Choices:
    """Decide what `request` leaves open, and refuse what cannot work.

    Raises UsageError, BundleError (checkpoint) and BackboneError (folder, GGUF header).
    """
    _check_options(request)
    if request.output is not None:
        check_target(request.output, force=request.force)
    warnings: list[str] = []
    checkpoint = _read_adapter(request, warnings)
    source = find_backbone(request.backbone, synthetic=request.synthetic)
    shape = _Shape.of(source)
    profile = choose_profile(request, shape.arch, checkpoint, warnings)
    profile = _encoder_dims(request, profile)
    dims = profile.dims(shape.n_embd)
    if checkpoint is None:
        from mse_export.adapter import init_random

        note = f"random initialisation, seed {request.seed}"
        state: Mapping[str, Any] = init_random(dims, request.seed).state_dict()
        adapter = Adapter(state, dims, Training("untrained", note))
    else:
        adapter = checkpoint
        _check_fit(adapter.dims, dims, source, profile)
    output = request.output or Path(_default_name(request, source, profile))
    check_target(output, force=request.force)
    target = _choose_quant(request.quant, shape, source)
    return Choices(
        source,
        adapter,
        profile,
        target,
        output,
        shape.gguf_bytes(source, target),
        tuple(warnings),
    )


def _check_options(request: Request) -> None:
    """What can be told from the options alone."""
    if request.adapter is not None and request.init is not None:
        raise UsageError("Give either --adapter or --init random, not both.")
    if request.adapter is None and request.init is None:
        raise UsageError(
            "No adapter was given and none is known for this backbone. Give a checkpoint of the "
            "published trainer or of mse-train with --adapter FILE, train one (mse-train --help), "
            "or make an untrained one for benchmarks with --init random --seed N."
        )
    if request.quant != "auto":
        quant(request.quant)
    known = sorted({dataset for _, dataset in profiles.published_runs()})
    if request.dataset not in (None, "clips", *known):
        raise UsageError(
            f"Unknown data set {request.dataset!r}; there are {', '.join(known)}, and clips for "
            "adapters that take raw clips."
        )
    if request.layout == "pseudo-last" and request.dataset not in (None, "clips"):
        raise UsageError(
            "Published data sets were trained with the published layout; pseudo-last is for "
            "adapters trained with mse-train (leave --dataset out)."
        )


def _default_name(request: Request, source: Source, profile: Profile) -> str:
    """A folder here: llama2-7b-mosei, tiny-mine, qwen-1.8b-synthetic."""
    if request.synthetic:
        return f"{source.name}-synthetic"
    if profile.dataset:
        return f"{source.name}-{profile.dataset}"
    return f"{source.name}-{request.adapter.stem if request.adapter else 'untrained'}"


@dataclass(frozen=True)
class _Shape:
    """What must be known of a backbone before anything large is written."""

    arch: str
    n_embd: int
    parameters: int
    recipes: Sequence[TensorRecipe] = ()
    quant_shape: Shape | None = None

    @classmethod
    def of(cls, source: Source) -> _Shape:
        from mse_export.backbones import architecture
        from mse_export.synthetic import model_shape

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
        metadata = module.metadata(config or {})
        return cls(
            module.ARCH,
            metadata["embedding_length"],
            sum(recipe.elements for recipe in recipes),
            recipes,
            model_shape(metadata, (recipe.name for recipe in recipes)),
        )

    def gguf_bytes(self, source: Source, target: Quant | None) -> int:
        """Bytes of the bundle's GGUF, some megabytes of vocabulary aside."""
        if self.quant_shape is not None and target is not None:
            return file_bytes(self.recipes, tensor_types(self.recipes, target, self.quant_shape))
        if source.path is None:
            return 0
        if target is None or target.base.name == _weight_type(source.path):
            return source.path.stat().st_size
        from mse_export.quantize import predicted_bytes

        return predicted_bytes(source.path, target)


def _read_adapter(request: Request, warnings: list[str]) -> Adapter | None:
    if request.adapter is None:
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
    return Adapter(
        checkpoint.state,
        checkpoint.dims,
        Training(
            "trained", str((said or {}).get("note") or f"weights from {request.adapter.name}")
        ),
        profile_from_metadata(about),
        validation if isinstance(validation, dict) else {},
    )


def choose_profile(
    request: Request, arch: str, adapter: Adapter | None, warnings: list[str]
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


def _ours(family: str, adapter: Adapter | None) -> Profile:
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


def _weight_type(path: Path) -> str:
    from mse_runtime.gguf import Gguf

    with Gguf.open(path) as header:
        return header.weight_type
