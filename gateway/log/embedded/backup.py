"""A copy of the log, made beside its owner."""

import os
import sqlite3
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from gateway.log.embedded.file import File, sync
from gateway.log.embedded.lock import is_owned
from gateway.model import UsageError

BACKUP_PATIENCE = 30.0  # Seconds to wait for a lock that recovery or the owner's start holds.
UNFINISHED = ".part"  # The end of the name of a copy that isn't whole.
LEFT_OVER = 3600.0  # Seconds for which nobody has written to it.


def back_up(path: Path, copy: Path) -> int:
    """Write a copy of a log as it is at this moment, beside its owner, and return its bytes; blocks until it is synced.

    What was acknowledged before the call is in it. `copy` is replaced once it is whole, however many make one at once.
    Appends go on meanwhile; the WAL grows by them until the copy is made. Raises UsageError where there is no log, no
    room for the copy, or where it would take the place of the log's own files or of a log in use.
    """
    file = File(path, is_owner=False, busy_timeout=BACKUP_PATIENCE, clock=time.time)
    unfinished: Path | None = None
    try:
        if own := own_file(path, copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got the log's {own}; name another one")
        if is_owned(copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got a log in use; name another one")
        delete_left_over(copy)
        # A database that is opened anew would be made for everybody to read.
        descriptor, name = tempfile.mkstemp(prefix=f"{copy.name}.", suffix=UNFINISHED, dir=copy.parent)
        os.close(descriptor)
        unfinished = Path(name)
        file.reader.execute("VACUUM INTO ?", (name,))  # Of one snapshot, and without a WAL beside it.
        sync(unfinished)  # SQLite doesn't do it by itself.
        size = unfinished.stat().st_size
        unfinished.replace(copy)
        sync(copy.parent)
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
    """Return which of a log's files a path is, whatever it is called there."""
    for base in (path, path.resolve()):  # SQLite has its files beside the one that a link is for.
        for suffix in ("", "-wal", "-shm", ".lock"):
            own = base.with_name(base.name + suffix)
            if own.resolve() == copy.resolve() or (own.exists() and copy.exists() and own.samefile(copy)):
                return own
    return None


def delete_left_over(copy: Path) -> None:
    """Delete what copies of this name have left behind that were killed. Whoever is still at one only fails."""
    for each in copy.parent.iterdir():
        if each.name.startswith(f"{copy.name}.") and each.name.endswith(UNFINISHED):
            with suppress(FileNotFoundError):  # It was finished meanwhile.
                if time.time() - each.stat().st_mtime > LEFT_OVER:
                    each.unlink()
