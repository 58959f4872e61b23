"""Appends lines to a file of a run, whatever happens to the disk."""

from __future__ import annotations

import os
from pathlib import Path


class Lines:
    """A file of lines. Lines that the disk has no space for are left out whole. A file that was removed is begun
    again."""

    def __init__(self, path: Path, head: str = "") -> None:
        """`head`: what a new file begins with."""
        self._path, self._head = path, head
        self._descriptor = self._opened()

    def append(self, text: str) -> None:
        """Add whole lines. OSError if they do not fit; nothing of them stays then."""
        if not os.fstat(self._descriptor).st_nlink:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._opened()
            self.close()
            self._descriptor = new
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        data = f"{'' if end else self._head}{text}".encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            os.ftruncate(self._descriptor, end)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _opened(self) -> int:
        return os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
