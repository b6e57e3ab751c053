"""Stamps that show whether a file has changed, without reading it each second."""

from collections.abc import Iterable, Mapping
from pathlib import Path

Stamp = tuple[int, int, int, int]
"""Changes with a file's content, owner and permissions."""
Stamps = Mapping[Path, Stamp | None]
"""None for a missing file."""


def stamp_of(file: Path) -> Stamp | None:
    """Return a stamp that changes with a file's content, also when a symbolic link points to another file.

    None if it is missing, out of reach, or if no file can have that name.
    """
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Return the stamps of several files."""
    return {file: stamp_of(file) for file in files}
