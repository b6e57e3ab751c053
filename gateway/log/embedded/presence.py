"""Whether the file is still where it was, and as it was: looked at before anything that was stored in it counts."""

import os
import struct
from pathlib import Path

from gateway.log.embedded.lock import has_wal, shm_of, wal_of

WAL_HEADER, FRAME_HEADER = 32, 24
"""Bytes (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)."""
INDEX = struct.Struct("=14xHII72xI")
"""Of the WAL's index: bytes of a page, frames in the WAL, pages of the database, frames that were moved into it.

The first 48 bytes are there twice (https://www.sqlite.org/walformat.html#the_wal_index_file_format).
"""
LARGEST_PAGE = 65536  # Which the index has as 1.


class Presence:
    """Three files by their identities and sizes. To be made by the owner when SQLite has opened them.

    A look takes some 5 µs. Close it after SQLite, as its lock: a descriptor is held here.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._descriptor = descriptor
        self._wal = wal_of(path).name
        # Text: `Path.stat` takes twice as long as all of `os.stat`.
        self._files = [
            (str(each), name, _identity(each.stat()))
            for each, name in ((path, "it"), (wal_of(path), self._wal), (shm_of(path), shm_of(path).name))
        ]
        self._size = 0
        self._index = os.open(shm_of(path), os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._index)

    def trouble(self) -> str | None:
        """Tell what has happened to the file, if it isn't what was opened any more. Raises OSError."""
        sizes = []
        for path, name, identity in self._files:
            try:
                found = os.stat(path)  # noqa: PTH116 - see above
            except (FileNotFoundError, NotADirectoryError):
                return f"{name} isn't there any more: it was moved or deleted"
            if _identity(found) != identity:
                return f"{name} is another file now: it was replaced"
            sizes.append(found.st_size)
        size, wal_size, _ = sizes
        return self._cut(size, wal_size) or self._overwritten()

    def _cut(self, size: int, wal_size: int) -> str | None:
        index = os.pread(self._index, INDEX.size, 0)
        if len(index) < INDEX.size or index[:48] != index[48:96]:
            return None  # It is being written by another process.
        page, frames, pages, moved = INDEX.unpack(index)
        page = LARGEST_PAGE if page == 1 else page
        if wal_size < (WAL_HEADER + frames * (FRAME_HEADER + page) if frames else 0):
            return f"{self._wal} has {wal_size} bytes, and not all that were written: it was truncated"
        # It is shorter than it was also after a sweep, but not by pages that aren't in the WAL.
        if size < self._size and size < max(1, pages - (frames - moved)) * page:
            return f"it has {size} bytes, and had {self._size}: it was truncated"
        self._size = size
        return None

    def _overwritten(self) -> str | None:
        return None if has_wal(self._descriptor) else "another file was copied over it"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
