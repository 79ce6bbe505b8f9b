"""Progress, for a command line to show."""

from __future__ import annotations

__all__ = ["Watcher"]


class Watcher:
    """Told what happens. This one shows nothing."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def progress(self, done: int, total: int) -> None:
        """Bytes of the present stage."""

    def note(self, text: str) -> None:
        """Something worth telling."""
