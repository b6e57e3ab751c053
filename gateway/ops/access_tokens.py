"""Makes, lists and revokes tokens in an access file, which other commands and people may change at the same time."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway.access.access_file import MAX_BYTES, AccessFileError, Grant, read_access, with_token, without_token
from gateway.model import UsageError


def read_tokens(file: Path) -> tuple[Grant, ...]:
    """Return the tokens of a file. Raises AccessFileError."""
    return read_access(_text(file), str(file)).tokens


def add_token(file: Path, grant: Grant) -> None:
    """Write a token into a file, which is made if it is missing.

    Raises AccessFileError, and UsageError if another token has its name.
    """
    with _changing(file) as (text, write):
        if any(each.name == grant.name for each in read_access(text, str(file)).tokens):
            raise UsageError(f"{file}: expected another name, got {grant.name!r}, which a token has")
        changed = with_token(text, grant)
        read_access(changed, str(file))  # not too many
        write(changed)


def revoke_token(file: Path, name: str) -> None:
    """Take a token out of a file. Raises AccessFileError, and UsageError if it has none of that name."""
    with _changing(file) as (text, write):
        tokens = read_access(text, str(file)).tokens
        if not any(each.name == name for each in tokens):
            known = ", ".join(sorted([each.name for each in tokens])) or "none"
            raise UsageError(f"{file}: expected the name of a token, got {name!r}; its tokens: {known}")
        write(without_token(text, name))


@contextmanager
def _changing(file: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Yield a file's text, and what replaces it at once. No other command changes a file of the folder meanwhile.

    What a symbolic link points to is replaced, and keeps its rights; a new file is its owner's alone.
    """
    target = file.resolve()
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise AccessFileError(f"{file}: expected a folder that it can be in, got: {_reason(error)}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        text = _text(target) if target.exists() else ""

        def write(changed: str) -> None:
            _replace(target, changed)
            os.fsync(folder)

        yield text, write
    finally:
        os.close(folder)


def _replace(target: Path, text: str) -> None:
    part = target.with_name(f".{target.name}.new")
    try:
        with suppress(FileNotFoundError):
            part.unlink()
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            with suppress(FileNotFoundError):
                before = target.stat()
                os.fchmod(descriptor, before.st_mode & 0o777)
                with suppress(PermissionError):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise AccessFileError(f"{target}: expected a file that can be written, got: {_reason(error)}") from error


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
        if len(content) > MAX_BYTES:
            raise AccessFileError(f"{file}: expected at most {MAX_BYTES >> 20} MiB")
        return content.decode()
    except OSError as error:
        raise AccessFileError(f"{file}: expected an access file, got: {_reason(error)}") from error
    except UnicodeDecodeError:
        raise AccessFileError(f"{file}: expected UTF-8, got other bytes") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
