"""Replaces a log without an owner by a copy."""

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
    have changed within a value SQLite knows nothing. If a call is killed, the next owner
    refuses what it left, and another call completes it. Raises LogUnavailableError if the log has an owner, UsageError
    for a copy that is damaged or of another version, or if there is no space for it.
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
        lock = acquire_name_lock(path)
        try:
            if is_file_locked(path):
                raise LogUnavailableError(f"{path} is in use by a gateway, by another name; stop it first")
            delete_leftovers(file)
            unfinished = _copied(copy, file)
            before, stray = _moved_aside(file)
            unfinished.replace(file)
            sync(file.parent)
        finally:
            os.close(lock)
    except OSError as error:
        raise UsageError(f"{path}: expected room for {copy}, got: {(error.strerror or str(error)).lower()}") from error
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
    return Restored(file.stat().st_size, before, stray)


def _copied(copy: Path, file: Path) -> Path:
    """Copy into a new file beside `file`, check and sync it, and return its path."""
    descriptor, name = tempfile.mkstemp(prefix=f"{file.name}.", suffix=UNFINISHED, dir=file.parent)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        shutil.copyfile(copy, unfinished)
        _check(unfinished, copy)
        if os.geteuid() == 0:  # Root restores for the gateway's own user.
            owner = (file if file.exists() else file.parent).stat()
            os.chown(unfinished, owner.st_uid, owner.st_gid)
        sync(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return unfinished


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


def _moved_aside(file: Path) -> tuple[Path | None, Path | None]:
    """Rename a log's files so that they stay together; return where the file is, if there was one, and a stray WAL.

    The file is renamed first: the next owner refuses a WAL without its file, but not a file without its WAL. If the WAL
    belongs to another file, this one gets another name, so that they aren't taken for a pair.
    """
    aside = file.with_name(f"{file.name}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    was_there, is_stray = file.exists(), is_wal_stray(file)
    before = aside.with_name(f"{aside.name}.instead") if is_stray else aside
    if was_there:
        file.rename(before)
    with suppress(FileNotFoundError):
        wal_of(file).rename(wal_of(aside))
    shm_of(file).unlink(missing_ok=True)  # SQLite recreates the WAL's index
    sync(file.parent)
    return before if was_there else None, wal_of(aside) if is_stray else None
