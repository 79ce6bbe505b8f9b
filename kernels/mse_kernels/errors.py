"""Errors of the kernels. They subclass built-in ones, since this package stands alone."""

from __future__ import annotations

__all__ = ["InputError", "KernelError", "UnavailableError", "WeightsError"]


class KernelError(Exception):
    """Base of every error raised by `mse_kernels`."""


class UnavailableError(KernelError, RuntimeError):
    """A backend that was asked for and cannot run here; the message is the reason."""


class WeightsError(KernelError, ValueError):
    """Adapter weights that are missing, misshapen, not finite, or beyond what a kernel takes."""


class InputError(KernelError, ValueError):
    """Features, text rows or lengths that a kernel refuses, named by input, sample and frame."""
