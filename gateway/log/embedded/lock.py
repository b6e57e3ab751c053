"""Whose file it is: a lock on its name and one on the file itself, so that no link and no deletion lets anybody in."""

import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

from gateway.model import LogUnavailableError, UsageError

BEGINNING = struct.Struct("16s2xBB")
"""Of a database: what it is, and by which version it is written and read: 2 is with a WAL, 1 without."""
MAGIC = b"SQLite format 3\0"
OWNERS_BYTE = 0x40000000 + 4096
"""Of the database: behind the bytes that SQLite locks there (from 0x40000000, 512 of them)."""
SHARED_BYTES = (0x40000000 + 2, 510)
"""What SQLite locks to have a database for itself alone, and how many of them."""


class Lock:
    """The owner's hold on a file that is there, or is made. `descriptor` is the file's, open for as long as it is held.

    One lock is on `NAME.lock` beside the file that a link leads to, where other processes read the owner's pid. The
    other is on a byte of the file, held by its open description: it doesn't touch SQLite's own locks, which are the
    process's. But those go whenever any descriptor of the file is closed: `close` comes after SQLite's.

    Raises LogUnavailableError where the file has an owner, UsageError where it has several names, and OSError.
    """

    def __init__(self, path: Path) -> None:
        self._name = lock_name(path)
        try:
            self.descriptor = _open(path)
        except BaseException:
            os.close(self._name)
            raise

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._name)


def keep_apart(descriptor: int) -> None:
    """Have SQLite change nothing in a file when it closes it: it isn't the file any more that its WAL is for.

    For as long as the descriptor is open; close it after SQLite.
    """
    with suppress(OSError):
        _lock_bytes(descriptor, fcntl.F_RDLCK, *SHARED_BYTES)


def is_owned(path: Path) -> bool:
    """Return whether a file has an owner, under whatever name. Not for the owner's own process."""
    return _is_name_locked(path) or is_file_locked(path)


def refuse_strange_name(path: Path) -> None:
    """Raise as `Lock` does where a file isn't to be opened by this name: SQLite has what is newest beside the name."""
    if _is_name_locked(path):
        return
    _refuse_other_names(path)
    # Without the owner's WAL beside it the file was moved since the owner opened it; else only its lock file is gone.
    if not wal_of(path).exists() and is_file_locked(path):
        raise _in_use(path, "by another name")


def is_database(descriptor: int) -> bool:
    return _beginning(descriptor)[0] == MAGIC


def has_wal(descriptor: int) -> bool:
    """Return whether it is a database that is used with a WAL: a copy that was made by `VACUUM INTO` isn't one yet."""
    return _beginning(descriptor) == (MAGIC, 2, 2)


def _beginning(descriptor: int) -> tuple[bytes, int, int]:
    return BEGINNING.unpack(os.pread(descriptor, BEGINNING.size, 0).ljust(BEGINNING.size, b"\0"))


def wal_of(path: Path) -> Path:
    """Return where SQLite writes what it hasn't moved into the file yet: beside the file that a link leads to."""
    file = path.resolve()
    return file.with_name(f"{file.name}-wal")


def shm_of(path: Path) -> Path:
    """Return where SQLite has the WAL's index, which its processes share."""
    file = path.resolve()
    return file.with_name(f"{file.name}-shm")


def _is_name_locked(path: Path) -> bool:
    try:
        name = os.open(_name_of(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(name, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(name)
    return False


def is_file_locked(path: Path) -> bool:
    """Return whether a file has an owner, which may have it under another name. Not for the owner's own process."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _lock_bytes(file, fcntl.F_RDLCK, OWNERS_BYTE, 1)
    finally:
        os.close(file)


def _refuse_other_names(path: Path) -> None:
    with suppress(FileNotFoundError):
        if (names := path.stat().st_nlink) > 1:
            raise UsageError(
                f"{path}: expected a file of one name, got {names} (hard links): by another one it lacks what was "
                f"stored last; find them by `find / -xdev -samefile {path}` and delete all but one"
            )


def is_wal_stray(path: Path) -> bool:
    """Return whether a WAL isn't of the file beside it: SQLite would delete it, or destroy the file by it."""
    wal = wal_of(path)
    return wal.exists() and wal.stat().st_size > 0 and (_is_missing(path) or _is_copy(path))


def _is_missing(path: Path) -> bool:
    return not path.exists() or not path.stat().st_size


def _is_copy(path: Path) -> bool:
    with path.open("rb") as file:
        return is_database(file.fileno()) and not has_wal(file.fileno())


def _refuse_stray_wal(path: Path) -> None:
    """Raise UsageError where a WAL isn't of the file beside it."""
    if not is_wal_stray(path):
        return
    if _is_missing(path):
        got = "none: it was moved, deleted or truncated alone; bring it back under this name, or run `gateway restore` "
        got += "with a copy"
    else:
        got = "a copy that was put in its place; run `gateway restore` with that copy, which moves the old files away"
    raise UsageError(f"{path}: expected the file that {wal_of(path).name} beside it is of, got {got}")


def _name_of(path: Path) -> Path:
    file = path.resolve()  # SQLite has its own files there, too.
    return file.with_name(f"{file.name}.lock")


def lock_name(path: Path) -> int:
    """Lock a name, as its file's owner does, and return a descriptor: closing it is giving it up."""
    lock = os.open(_name_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise _in_use(path, f"pid {pid}") from None
    except BaseException:
        os.close(lock)
        raise
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _open(path: Path) -> int:
    _refuse_other_names(path)
    _refuse_stray_wal(path)
    # Bodies are nobody else's to read; SQLite gives the files beside it the same mode.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    is_locked, is_here = _lock_bytes(file, fcntl.F_WRLCK, OWNERS_BYTE, 1), os.path.samestat(os.fstat(file), path.stat())
    if is_locked and is_here:
        return file
    os.close(file)
    if is_here:
        raise _in_use(path, "by another name, or its lock file was deleted")
    raise LogUnavailableError(f"{path}: expected a file that stays, got another one in its place")


def _in_use(path: Path, whose: str) -> LogUnavailableError:
    return LogUnavailableError(f"{path} is in use by another gateway ({whose}); the embedded log is one process's")


def _lock_bytes(file: int, kind: int, start: int, length: int) -> bool:
    """Lock bytes of a file (fcntl(2), "Open file description locks"), and tell whether that was possible."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True
