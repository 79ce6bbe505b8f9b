"""One error type per exit code: every message says what is wrong, why, and what to do next.

The command line prints the message as one paragraph and exits with `exit_code`; nothing else
in the package calls `sys.exit`.
"""

from __future__ import annotations

__all__ = [
    "BackboneError",
    "BundleError",
    "DecodeError",
    "DeviceError",
    "MSEError",
    "MediaError",
    "StoppedError",
    "UsageError",
]


class MSEError(Exception):
    """Base of every error meant for the user."""

    exit_code = 1


class UsageError(MSEError):
    """Arguments that do not go together, or an option with no meaning here (exit code 2)."""

    exit_code = 2


class MediaError(MSEError):
    """A clip or feature file that cannot be read (exit code 3)."""

    exit_code = 3


class BundleError(MSEError):
    """A bundle that is missing, damaged, of another version or disagrees with itself (4)."""

    exit_code = 4


class DeviceError(MSEError):
    """A device that was asked for and cannot be used, or too little memory (exit code 5)."""

    exit_code = 5


class BackboneError(MSEError):
    """The language model cannot be loaded or refused a batch (exit code 6)."""

    exit_code = 6


class DecodeError(BackboneError):
    """A pass that llama.cpp itself gave up: it may go through with less in memory."""


class StoppedError(BackboneError):
    """A pass that was given up because somebody asked for it."""
