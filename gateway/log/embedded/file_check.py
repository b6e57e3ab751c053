"""Checks that the opened file is still in place and intact, before anything stored in it counts as stored."""

import os
import struct
from pathlib import Path

from gateway.log.embedded.lock import has_wal, shm_of, wal_of

WAL_HEADER, FRAME_HEADER = 32, 24
"""Bytes (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)."""
INDEX = struct.Struct("=14xHII72xI")
"""The WAL's index: page size, frames in the WAL, pages of the database, frames already moved into the database.

The first 48 bytes are stored twice (https://www.sqlite.org/walformat.html#the_wal_index_file_format).
"""
LARGEST_PAGE = 65536  # stored as 1 in the index
LOCK_BYTES = 0x40000000  # the page with SQLite's lock bytes is never written


class FileCheck:
    """The identities and sizes of the three files. Create it after SQLite has opened them; owners have a `descriptor`.

    A check takes about 5 µs. Close it after SQLite, like the lock: it keeps a descriptor open.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._wal = wal_of(path).name
        # Strings: `Path.stat` takes twice as long as `os.stat`.
        self._files = [
            (str(each), name, _identity(each.stat()))
            for each, name in ((path, "it"), (wal_of(path), self._wal), (shm_of(path), shm_of(path).name))
        ]
        self._size: int | None = None  # The first check finds a file that was truncated earlier.
        self._index = os.open(shm_of(path), os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._index)

    def problem(self) -> str | None:
        """Return what has happened to the opened file; None if it is intact. Raises OSError."""
        index = self._read_index()
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
        return self._truncated(size, wal_size, index) or self._overwritten()

    def _read_index(self) -> bytes:
        return os.pread(self._index, INDEX.size, 0)

    def _truncated(self, size: int, wal_size: int, index: bytes) -> str | None:
        if len(index) < INDEX.size or index[:48] != index[48:96] or index != self._read_index():
            return None  # another process is writing it
        page, frames, pages, moved = INDEX.unpack(index)
        page = LARGEST_PAGE if page == 1 else page
        if wal_size < (WAL_HEADER + frames * (FRAME_HEADER + page) if frames else 0):
            return f"{self._wal} has {wal_size} bytes, and not all that were written: it was truncated"
        # A sweep, too, makes the file shorter, but then each page beyond its end is in the WAL, still to be moved.
        # The index has no pages until the first commit, and nothing is moved until then.
        if (self._size is None or size < self._size) and size < (pages * page or self._size or 0):
            is_whole = size > 0 < pages and self._has(range(size // page + 1, pages + 1), page, range(moved, frames))
            if index != self._read_index():
                return None
            if not is_whole:
                return f"it has {size} bytes, and had more: it was truncated"
        self._size = size
        return None

    def _has(self, pages: range, page: int, frames: range) -> bool:
        """Return whether the WAL has these pages in these frames. Each frame begins with its page's number."""
        if len(pages) > len(frames) + 1:  # no need to read them; there may be millions of pages
            return False
        wal = os.open(self._files[1][0], os.O_RDONLY | os.O_CLOEXEC)
        try:
            starts = [WAL_HEADER + frame * (FRAME_HEADER + page) for frame in frames]
            found = {int.from_bytes(os.pread(wal, 4, start)) for start in starts}
        finally:
            os.close(wal)
        return found.issuperset(set(pages) - {LOCK_BYTES // page + 1})

    def _overwritten(self) -> str | None:
        return None if self._descriptor is None or has_wal(self._descriptor) else "another file was copied over it"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
