"""The owner's lock: one on the file's name and one on the file itself, so that links and deletions don't bypass it."""

import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

from gateway.model import LogUnavailableError, UsageError

BEGINNING = struct.Struct("16s2xBB")
"""A database file's header: the magic string, and the versions to write and read it: 2 with a WAL, 1 without."""
MAGIC = b"SQLite format 3\0"
OWNERS_BYTE = 0x40000000 + 4096
"""Byte of the database that the owner locks: after the 512 bytes from 0x40000000 that SQLite locks."""
SHARED_BYTES = (0x40000000 + 2, 510)
"""First byte and number of bytes that SQLite locks for exclusive access."""


class Lock:
    """The owner's locks on a file, which is created if missing. `descriptor` is the file's, open until `close`.

    One lock is on `NAME.lock` beside a link's target, where other processes read the owner's pid. The other is on a
    byte of the file, as an open file description lock: it doesn't affect SQLite's own locks, which belong to the
    process. But those are released whenever any descriptor of the file is closed, so `close` must come after SQLite's.

    Raises LogUnavailableError if the file has an owner, UsageError if it has several names or was taken away, and
    OSError.
    """

    def __init__(self, path: Path) -> None:
        self._name = _lock_name(path)
        try:
            self.descriptor = _open(path, self._name)
            _write_pid(self._name)
        except BaseException:
            os.close(self._name)
            raise

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._name)


def prevent_checkpoint(descriptor: int) -> None:
    """Prevent SQLite from moving the WAL into the file when it closes it, since the WAL belongs to another file.

    Effective as long as the descriptor is open; close it after SQLite.
    """
    with suppress(OSError):
        _lock_bytes(descriptor, fcntl.F_RDLCK, *SHARED_BYTES)


def is_owned(path: Path) -> bool:
    """Return whether a file has an owner, under whatever name. Not to be called in the owner's own process."""
    return _is_name_locked(path) or is_file_locked(path)


def refuse_other_name(path: Path) -> None:
    """Raise as `Lock` does if a file mustn't be opened by this name: SQLite's WAL is beside the owner's name."""
    _refuse_directory(path)
    if _is_name_locked(path):
        return
    _refuse_other_names(path)
    # Without the owner's WAL beside it, the file was moved since it was opened; with it, only the lock file is gone.
    if not wal_of(path).exists() and is_file_locked(path):
        raise _in_use(path, "by another name")


def is_database(descriptor: int) -> bool:
    return _beginning(descriptor)[0] == MAGIC


def has_wal(descriptor: int) -> bool:
    """Return whether it is a database in WAL mode: a copy made by `VACUUM INTO` isn't yet."""
    return _beginning(descriptor) == (MAGIC, 2, 2)


def _beginning(descriptor: int) -> tuple[bytes, int, int]:
    return BEGINNING.unpack(os.pread(descriptor, BEGINNING.size, 0).ljust(BEGINNING.size, b"\0"))


def wal_of(path: Path) -> Path:
    """Return the path of the WAL, which is beside a link's target."""
    file = path.resolve()
    return file.with_name(f"{file.name}-wal")


def shm_of(path: Path) -> Path:
    """Return the path of the WAL's index, which SQLite's processes share."""
    file = path.resolve()
    return file.with_name(f"{file.name}-shm")


def _is_name_locked(path: Path) -> bool:
    try:
        name = os.open(_lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
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
    """Return whether a file has an owner, perhaps under another name. Not to be called in the owner's own process."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _lock_bytes(file, fcntl.F_RDLCK, OWNERS_BYTE, 1)
    finally:
        os.close(file)


def _refuse_directory(path: Path) -> None:
    """Raise UsageError for a directory, before a lock file is created beside it."""
    if path.is_dir():
        raise UsageError(f"{path}: expected an embedded log, got: is a directory")


def _refuse_other_names(path: Path) -> None:
    with suppress(FileNotFoundError):
        if (names := path.stat().st_nlink) > 1:
            raise UsageError(
                f"{path}: expected a file of one name, got {names} (hard links): by another one it lacks what was "
                f"stored last; find them by `find / -xdev -samefile {path}` and delete all but one"
            )


def is_wal_stray(path: Path) -> bool:
    """Return whether a WAL doesn't belong to the file beside it: SQLite would delete it, or corrupt the file by it."""
    wal = wal_of(path)
    return wal.exists() and wal.stat().st_size > 0 and (_is_missing(path) or _is_copy(path))


def _is_missing(path: Path) -> bool:
    return not path.exists() or not path.stat().st_size


def _is_copy(path: Path) -> bool:
    with path.open("rb") as file:
        return is_database(file.fileno()) and not has_wal(file.fileno())


def _refuse_stray_wal(path: Path) -> None:
    """Raise UsageError if a WAL doesn't belong to the file beside it."""
    if not is_wal_stray(path):
        return
    if _is_missing(path):
        got = "none: it was moved, deleted or truncated alone; restore it under this name, or run `gateway restore` "
        got += "with a backup"
    else:
        got = "a copy that was put in its place; run `gateway restore` with that copy, which moves the old files away"
    raise UsageError(f"{path}: expected the file to which {wal_of(path).name} belongs, got {got}")


def _refuse_taken_away(path: Path, name: int) -> None:
    """Raise UsageError if an owner has written its pid into the lock file, and what it owned isn't there any more.

    A new file would be empty, and acknowledge events until somebody puts the old one back over it.
    """
    if os.pread(name, 1, 0) and not path.exists():
        raise UsageError(
            f"{path}: expected the file that {_lock_path(path).name} was made for, got none: it was moved or deleted; "
            "put it back, with its WAL if it had one, or a log's backup by `gateway restore`; to begin an empty one, "
            f"delete {_lock_path(path).name}"
        )


def _lock_path(path: Path) -> Path:
    file = path.resolve()  # where SQLite's own files are, too
    return file.with_name(f"{file.name}.lock")


def acquire_name_lock(path: Path) -> tuple[int, bool]:
    """Lock a file's name, as its owner does; return a descriptor, and whether the name has had an owner before.

    Closing the descriptor releases the lock.
    """
    lock = _lock_name(path)
    was_owned = bool(os.pread(lock, 1, 0))
    _write_pid(lock)
    return lock, was_owned


def _lock_name(path: Path) -> int:
    """Lock a file's name; who has had it before stays in the lock file."""
    _refuse_directory(path)
    lock = _open_name_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        if not pid:
            raise LogUnavailableError(
                f"{path} is in use by a process that has written no pid into {_lock_path(path).name}: "
                "an index is in it, or a gateway has only just started"
            ) from None
        raise _in_use(path, f"pid {pid}") from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _write_pid(lock: int) -> None:
    pid = b"%d\n" % os.getpid()
    os.pwrite(lock, pid, 0)
    os.truncate(lock, len(pid))


def _open_name_lock(path: Path) -> int:
    """Open a file's lock. One that root creates, as for a restore, is its file's owner's, who opens it next."""
    name = _lock_path(path)
    is_there = name.exists()
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({name})") from error
    try:
        if not is_there and os.geteuid() == 0:
            owner = (path if path.exists() else name.parent).stat()
            os.fchown(lock, owner.st_uid, owner.st_gid)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _open(path: Path, name: int) -> int:
    _refuse_other_names(path)
    _refuse_stray_wal(path)
    _refuse_taken_away(path, name)
    # Nobody else may read bodies; SQLite gives the files beside it the same mode.
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
    """Try to lock bytes of a file (fcntl(2), "Open file description locks"); return whether that succeeded."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True
