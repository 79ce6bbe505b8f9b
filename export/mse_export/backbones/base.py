"""What one architecture file says: GGUF metadata and a recipe per tensor, from a Hugging Face
config. Nothing here touches weights, so the same recipes serve conversion and synthetic models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mse_runtime.errors import BackboneError

__all__ = ["Architecture", "Config", "TensorRecipe", "number", "refuse", "rope_inverse_factors"]

Config = Mapping[str, Any]
Metadata = dict[str, Any]


@dataclass(frozen=True)
class TensorRecipe:
    """One GGUF tensor and where it comes from."""

    name: str
    shape: tuple[int, ...]
    """Row-major: (rows, columns) for a matrix."""
    source: str
    """Tensor name in the Hugging Face checkpoint; empty for a computed one."""
    interleave_heads: int = 0
    """Number of heads whose rows go from half-split to interleaved rotary order; 0: none."""
    values: tuple[float, ...] | None = None
    """The data itself, for a computed vector."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def keeps_f32(self) -> bool:
        """Norms and biases stay F32 in every quantisation."""
        return len(self.shape) == 1


class Architecture(Protocol):
    """The two functions and three names of each module in this package."""

    ARCH: str
    """llama.cpp's name."""
    MODEL_TYPES: tuple[str, ...]
    """Values of `model_type` in config.json."""
    CLASSES: tuple[str, ...]
    """Values of `architectures` in config.json that are supported."""

    def metadata(self, config: Config) -> Metadata:
        """GGUF keys without the `<arch>.` prefix."""

    def tensors(self, config: Config) -> list[TensorRecipe]:
        """Every tensor, in file order."""


def number(config: Config, *names: str, default: Any = None) -> Any:
    """The first of `names` that the config has; `BackboneError` where none is there."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is not None:
        return default
    raise BackboneError(
        f"config.json has no {names[0]!r}. The folder is not a complete Hugging Face model of this "
        "family; download it again."
    )


def refuse(what: str) -> BackboneError:
    """An error for a variant that this converter would get wrong."""
    return BackboneError(
        f"This model uses {what}, which this converter does not write. Convert it with llama.cpp's "
        "own tools and give the result: mse-export --backbone FILE.gguf"
    )


def rope_inverse_factors(config: Config, rope_dim: int) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies for `rope_type: llama3`; None without such scaling.

    Frequencies whose wavelength exceeds the original context are divided by `factor`, short ones
    are left alone, with a linear ramp between (the scheme of the Llama 3.1 release).
    """
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in (None, "default"):
        return None
    if kind != "llama3":
        raise refuse(f"rotary scaling of type {kind!r}")
    base = float(number(config, "rope_theta", default=10000.0))
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    factors = []
    for i in range(rope_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * i / rope_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            ramp = (context / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - ramp) / factor + ramp))
    return tuple(factors)
