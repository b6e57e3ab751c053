"""What tells that a file has changed: cheaper than to read it, each second."""

from collections.abc import Iterable, Mapping
from pathlib import Path

Stamp = tuple[int, int, int, int]
"""Changes with a file's content, and with who may read it."""
Stamps = Mapping[Path, Stamp | None]
"""None for a missing file."""


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Return stamps that change with the files' content, also when a symbolic link points to another file."""
    stamps: dict[Path, Stamp | None] = {}
    for file in files:
        try:
            stat = file.stat()
            stamps[file] = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns)
        except OSError:
            stamps[file] = None
    return stamps
