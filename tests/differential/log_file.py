"""A log that another process is writing."""

from __future__ import annotations

from pathlib import Path


class LogFile:
    """Gives each whole line once, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new_lines(self) -> list[str]:
        """Give the lines that have been completed since the last call; bytes as Latin-1."""
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, end, _ = file.read().rpartition(b"\n")
        if not end:
            return []
        self._at += len(whole) + 1
        return [line.decode("latin-1") for line in whole.split(b"\n")]
