"""Checks that the opened file is still in place and intact, before anything stored in it counts as stored."""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gateway.log.embedded.lock import has_wal, is_file_locked, shm_of, wal_of
from gateway.model import UsageError

WAL_HEADER, FRAME_HEADER = 32, 24
"""Bytes (https://www.sqlite.org/fileformat2.html#the_write_ahead_log)."""
INDEX = struct.Struct("=14xHIIII8s56xI")
"""The WAL's index: page size, frames in the WAL, pages of the database, the checksum of the last frame (two numbers),
the WAL's salts, frames already moved into the database.

The first 48 bytes are stored twice (https://www.sqlite.org/walformat.html#the_wal_index_file_format).
"""
FRAME = struct.Struct(">8x8sII")
"""A frame's header: the WAL's salts, and the checksum of all frames up to this one (two numbers)."""
HEADER = struct.Struct(">I12x8sII")
"""The WAL's header: a magic number (its last bit: checksums are of big-endian words), the WAL's salts, and the
header's own checksum."""
LARGEST_PAGE = 65536  # stored as 1 in the index
LOCK_BYTES = 0x40000000  # the page with SQLite's lock bytes is never written


class FileCheck:
    """The identities and sizes of the three files. Create it after SQLite has opened them; owners have a `descriptor`.

    A check takes about 10 µs. Close it after SQLite, like the lock: it keeps descriptors open.
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
        self._last: _Frame | None = None
        self._frames = os.open(wal_of(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._index = os.open(shm_of(path), os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._frames)
            raise

    def close(self) -> None:
        os.close(self._index)
        os.close(self._frames)

    def moved(self) -> str | None:
        """Return what has happened to the opened file's name; None if it is still that file's. Raises OSError."""
        found = _looked_at(*self._files[0])
        return found if isinstance(found, str) else None

    def problem(self) -> str | None:
        """Return what has happened to the opened file; None if it is intact. Raises OSError."""
        index = self._read_index()
        sizes = []
        for each in self._files:
            found = _looked_at(*each)
            if isinstance(found, str):
                return found
            sizes.append(found.st_size)
        size, wal_size, _ = sizes
        return self._truncated(size, wal_size, index) or self._overwritten()

    def _read_index(self) -> bytes:
        return os.pread(self._index, INDEX.size, 0)

    def _truncated(self, size: int, wal_size: int, index: bytes) -> str | None:
        if not _is_settled(index) or index != self._read_index():
            return None  # another process is writing it
        page, frames, pages, *checksum, salts, moved = INDEX.unpack(index)
        page = LARGEST_PAGE if page == 1 else page
        if wal_size < _end_of(frames, page):
            return f"{self._wal} has {wal_size} bytes, and not all that were written: it was truncated"
        if not self._has_what_was_written(frames, page, salts, checksum):
            changed = f"{self._wal} hasn't the content that was written: it was truncated or overwritten"
            return changed if index == self._read_index() else None
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

    def _has_what_was_written(self, frames: int, page: int, salts: bytes, checksum: Sequence[int]) -> bool:
        """Return whether the WAL's last frame is the one that the index names, and the last one before is unchanged.

        The size doesn't say so: what SQLite writes behind the end of a WAL that was truncated a moment ago makes it as
        long as it was, with zeros where frames were. All that comes after a truncation is missing, so that one frame
        from before it shows it.
        """
        last, self._last = self._last, None
        is_same = last is not None and last.salts == salts and last.number <= frames
        if is_same and last is not None and self._frame(last.number, page) != last.content:
            return False
        if not frames:
            return True
        content = last.content if is_same and last is not None and last.number == frames else self._frame(frames, page)
        if len(content) < FRAME_HEADER + page or FRAME.unpack_from(content) != (salts, *checksum):
            return False
        self._last = _Frame(salts, frames, content)
        return True

    def _frame(self, number: int, page: int) -> bytes:
        """Return a frame with its header; the first one has the number 1."""
        return os.pread(self._frames, FRAME_HEADER + page, _end_of(number - 1, page) or WAL_HEADER)

    def _has(self, pages: range, page: int, frames: range) -> bool:
        """Return whether the WAL has these pages in these frames. Each frame begins with its page's number."""
        if len(pages) > len(frames) + 1:  # no need to read them; there may be millions of pages
            return False
        starts = [WAL_HEADER + frame * (FRAME_HEADER + page) for frame in frames]
        found = {int.from_bytes(os.pread(self._frames, 4, start)) for start in starts}
        return found.issuperset(set(pages) - {LOCK_BYTES // page + 1})

    def _overwritten(self) -> str | None:
        return None if self._descriptor is None or has_wal(self._descriptor) else "another file was copied over it"


class _Frame(NamedTuple):
    """A frame of the WAL that was there at the last check; frames of other salts were written over."""

    salts: bytes
    number: int
    content: bytes


def refuse_shortened_wal(path: Path, *, is_owner: bool) -> None:
    """Raise UsageError for a log whose WAL was taken away, or cut, while a process had it open; nobody may open it.

    SQLite would go on without what was acknowledged last, and overwrite or delete what there is of it, though the WAL
    that was moved away may still be there. Its last connection deletes the index before the WAL, so an index without
    its WAL means that somebody else has deleted or moved that; and what an index names was synced before.

    After a crash it reads the WAL as SQLite will, but takes 0.15 s for a thousand frames, which is where SQLite begins
    to reuse a WAL. It leaves that to the owner, if there is another one.
    """
    index = _read_index(path)
    if not _is_settled(index):
        return
    page, frames, _, _, _, salts, moved = INDEX.unpack(index)
    page = LARGEST_PAGE if page == 1 else page
    if frames <= moved:
        return
    wal = wal_of(path)
    try:
        with wal.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _end_of(frames, page):
                got = f"one of {size} bytes: it was truncated"
            elif not is_owner and is_file_locked(path):
                return
            elif (intact := _intact_frames(file, frames, page, salts)) < frames:
                got = f"one with {intact} intact of {frames} frames: it was truncated or overwritten"
            else:
                return
    except FileNotFoundError:
        got = "none: it was moved or deleted alone"
    if index != _read_index(path):
        return  # another process has it open, and has moved frames or closed it meanwhile
    raise UsageError(
        f"{path}: expected {wal.name} with what was stored last, got {got}; restore it, or run `gateway restore` "
        f"with a backup; to go on without what was stored last, delete {shm_of(path).name}"
    )


def _read_index(path: Path) -> bytes:
    """Return the beginning of a WAL's index; empty if there is none."""
    try:
        with shm_of(path).open("rb") as file:
            return file.read(INDEX.size)
    except FileNotFoundError:
        return b""


def _intact_frames(wal: BinaryIO, frames: int, page: int, salts: bytes) -> int:
    """Return how many of these frames SQLite will take: those before the first one whose checksum is wrong.

    All of them if the WAL has other salts: it was started anew since the index was written, which a machine that lost
    its power may have kept from before (https://www.sqlite.org/fileformat2.html#wal_file_format).
    """
    header = wal.read(WAL_HEADER)
    magic, found, *stated = HEADER.unpack(header)
    order = ">" if magic & 1 else "<"
    checksum = _checksum(header[:24], (0, 0), order)
    if not magic or checksum != (*stated,):
        return 0
    if found != salts:
        return frames
    for number in range(frames):
        frame = wal.read(FRAME_HEADER + page)
        checksum = _checksum(frame[:8] + frame[FRAME_HEADER:], checksum, order)
        if FRAME.unpack_from(frame) != (salts, *checksum):
            return number
    return frames


def _checksum(content: bytes, before: tuple[int, int], order: str) -> tuple[int, int]:
    """Return SQLite's checksum of pairs of words, which goes on from `before`."""
    first, second = before
    for one, other in struct.iter_unpack(f"{order}II", content):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _is_settled(index: bytes) -> bool:
    """Return whether an index was read as a whole: both copies of its header are the same."""
    return len(index) == INDEX.size and index[:48] == index[48:96]


def _end_of(frames: int, page: int) -> int:
    """Return the size of a WAL with that many frames, 0 without any."""
    return WAL_HEADER + frames * (FRAME_HEADER + page) if frames else 0


def _looked_at(path: str, name: str, identity: tuple[int, int]) -> os.stat_result | str:
    """Return a file's state, or what has happened to it."""
    try:
        found = os.stat(path)  # noqa: PTH116 - `Path.stat` takes twice as long
    except (FileNotFoundError, NotADirectoryError):
        return f"{name} isn't there any more: it was moved or deleted"
    return found if _identity(found) == identity else f"{name} is another file now: it was replaced"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
