"""Copies the log while its owner is running."""

import os
import sqlite3
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gateway.log.embedded.file import File, sync
from gateway.log.embedded.lock import is_owned
from gateway.model import UsageError

BACKUP_LOCK_TIMEOUT = 30.0  # Seconds to wait for a lock that SQLite's recovery or the starting owner holds.
UNFINISHED = ".part"  # File name suffix of an incomplete copy.
MIN_LEFTOVER_AGE = 3600.0  # Seconds since the last write after which an incomplete copy is deleted.


def back_up(path: Path, copy: Path) -> int:
    """Write a copy of a log as it is now, while its owner is running; return its size in bytes. Blocks until synced.

    It contains all that was acknowledged before the call. `copy` is replaced once it is complete, even with concurrent
    backups; if it is a symbolic link, its target is. Appends continue meanwhile, and the WAL grows by them. Raises
    UsageError if there is no log, no space for the copy, or if it would replace one of the log's own files or a log in
    use.
    """
    file = File(path, is_owner=False, busy_timeout=BACKUP_LOCK_TIMEOUT, clock=time.time)
    unfinished: Path | None = None
    try:
        if own := own_file(path, copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got the log's {own}; name another one")
        if is_owned(copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got a log in use; name another one")
        target = copy.resolve()
        delete_leftovers(target)
        # SQLite would create the file readable for everybody.
        descriptor, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=UNFINISHED, dir=target.parent)
        os.close(descriptor)
        unfinished = Path(name)
        file.reader.execute("VACUUM INTO ?", (name,))  # a consistent snapshot, without a WAL
        sync(unfinished)  # SQLite doesn't
        size = unfinished.stat().st_size
        unfinished.replace(target)
        sync(target.parent)
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{copy}: expected room for a copy of {path}, got: {reason}") from error
    else:
        return size
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        file.close()


def own_file(path: Path, copy: Path) -> Path | None:
    """Return which of a log's files a path refers to, by whatever name; None if none."""
    for base in (path, path.resolve()):  # SQLite keeps its files beside a link's target.
        for suffix in ("", "-wal", "-shm", ".lock"):
            own = base.with_name(base.name + suffix)
            if own.resolve() == copy.resolve() or (own.exists() and copy.exists() and own.samefile(copy)):
                return own
    return None


def delete_leftovers(copy: Path) -> None:
    """Delete incomplete copies that killed backups of this name have left. A backup still in progress only fails."""
    for each in copy.parent.iterdir():
        if each.name.startswith(f"{copy.name}.") and each.name.endswith(UNFINISHED):
            with suppress(FileNotFoundError):  # it was completed meanwhile
                if time.time() - each.stat().st_mtime > MIN_LEFTOVER_AGE:
                    each.unlink()
