"""Replaces a log without an owner by a copy."""

import errno
import glob
import itertools
import os
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from gateway.log.embedded.backup import UNFINISHED, delete_leftovers, own_file
from gateway.log.embedded.file import sync
from gateway.log.embedded.lock import acquire_name_lock, is_file_locked, is_wal_stray, shm_of, wal_of
from gateway.log.embedded.statements import APPLICATION_ID, SCHEMA_VERSION
from gateway.model import LogUnavailableError, UsageError

MAX_PROBLEMS = 3
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
"""What link(2) fails with where the file system, or the system's rules for another user's file, have no hard links."""


class Restored(NamedTuple):
    """The log's size in bytes, and where the previous file is, if there was one, with its WAL beside it.

    `stray` is a WAL without its file: it may have the last acknowledged records, readable only together with that file.
    """

    size: int
    before: Path | None
    stray: Path | None


def restore(path: Path, copy: Path) -> Restored:
    """Replace a log by a copy; its own files are moved aside. Blocks until synced.

    The structure of the whole copy is checked before anything is changed, and the copy stays where it is. Of bytes that
    have changed within a value SQLite knows nothing. If a call is killed, the log is what it was, or the copy, or the
    next owner refuses what it left, and another call completes it. Raises LogUnavailableError if the log has an owner,
    UsageError for a copy that is damaged or of another version, or if there is no space for it.
    """
    if not copy.is_file():
        raise UsageError(f"{copy}: expected a copy of a log, got no file")
    if own := own_file(path, copy):
        raise UsageError(f"{copy}: expected a copy of a log, got the log's own {own}")
    if (wal := wal_of(copy)).exists() and wal.stat().st_size:
        raise UsageError(
            f"{copy}: expected a copy that `gateway backup` has made, got a log with a WAL ({wal.name}), without which "
            "it isn't whole; make a copy of it by `gateway backup`"
        )
    file = path.resolve()
    unfinished: Path | None = None
    try:
        lock, was_owned = acquire_name_lock(path)
        try:
            if is_file_locked(path):
                raise LogUnavailableError(f"{path} is in use by a gateway, by another name; stop it first")
            delete_leftovers(file)
            unfinished = _copied(copy, file, like=file if file.exists() else file.parent)
            _check(unfinished, copy)
            before, stray = _put_in_place(unfinished, file)
        finally:
            if not was_owned and not file.exists():
                os.truncate(lock, 0)  # or the first start would look for what the name was locked for
            os.close(lock)
    except OSError as error:
        raise UsageError(f"{path}: expected room for {copy}, got: {(error.strerror or str(error)).lower()}") from error
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
    return Restored(file.stat().st_size, before, stray)


def _copied(source: Path, name: Path, *, like: Path) -> Path:
    """Copy into a new file beside `name`, sync it, and return its path. Its owner is that of `like`."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f"{name.name}.", suffix=UNFINISHED, dir=name.parent)
    os.close(descriptor)
    copied = Path(unfinished)
    try:
        shutil.copyfile(source, copied)
        if os.geteuid() == 0:  # Root restores for the gateway's own user.
            owner = like.stat()
            os.chown(copied, owner.st_uid, owner.st_gid)
        sync(copied)
    except BaseException:
        copied.unlink(missing_ok=True)
        raise
    return copied


def _check(unfinished: Path, copy: Path) -> None:
    try:
        with closing(sqlite3.connect(unfinished)) as connection:
            application, version = [
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            ]
            problems = [problem for (problem,) in connection.execute(f"PRAGMA integrity_check({MAX_PROBLEMS})")]
    except sqlite3.Error as error:
        raise UsageError(f"{copy}: expected a copy of a log, got: {error}") from error
    if application != APPLICATION_ID or version != SCHEMA_VERSION:
        got = f"version {version}" if application == APPLICATION_ID else "another program's database"
        raise UsageError(f"{copy}: expected a copy of a log of version {SCHEMA_VERSION}, got {got}")
    if problems != ["ok"]:
        raise UsageError(f"{copy}: expected a copy that is whole, got: {'; '.join(problems)}")


def _put_in_place(new: Path, file: Path) -> tuple[Path | None, Path | None]:
    """Give a log's name to a new file; return where the log's own is kept, if there was one, and a stray WAL.

    At each step there is a file, since an owner would create an empty one. With a second name, it is refused; so is a
    copy beside a WAL. So the WAL goes last, to where its file is kept. If it belongs to another file, the log's gets
    another name, so that they aren't taken for a pair.
    """
    is_stray = is_wal_stray(file)
    aside = _free_name(file)
    before: Path | None = None
    try:
        if file.exists():
            before = _kept(file, aside.with_name(f"{aside.name}.instead") if is_stray else aside)
            sync(file.parent)  # so that no crash of the machine changes the order
        new.replace(file)
    except BaseException:
        if before is not None:
            before.unlink()
        raise
    sync(file.parent)
    shm_of(file).unlink(missing_ok=True)  # SQLite recreates the WAL's index
    wal = wal_of(aside if is_stray or before is None else before)
    with suppress(FileNotFoundError):
        wal_of(file).rename(wal)
    sync(file.parent)
    return before, wal if is_stray else None


def _free_name(file: Path) -> Path:
    """Return a name beside a log for what it was until now, which neither a file nor a WAL has yet."""
    at = f"{file.name}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (file.with_name(at if number == 1 else f"{at}-{number}") for number in itertools.count(1))
    return next(each for each in names if not each.exists() and not wal_of(each).exists())


def _kept(file: Path, name: Path) -> Path:
    """Give a file a second name, and return it: the one that a call which was killed has given it, if there is one.

    Where the file system has no hard links, a copy gets it.
    """
    for each in file.parent.glob(f"{glob.escape(file.name)}.before-*"):
        if each.samefile(file):
            return each
    try:
        os.link(file, name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _copied(file, name, like=file).replace(name)
    return name
