"""An event as the command by which curl sends it again, for a shell. Pure.

What is pasted into a terminal must be text alone: whatever isn't printable is written as an escape of the shell.
"""

import re
import shlex
from collections.abc import Iterable

ADDRESS = "http://127.0.0.1:8080"
"""Where an ingress listens by default."""
MOST_INLINE = 8 << 10
"""Bytes of a body that is written into the command; another one is read from the file that was downloaded."""
_RANGES = re.compile(r"[\[\]{}]")
_OF_CONNECTION = frozenset({"connection", "content-length", "expect", "host", "transfer-encoding", "te", "upgrade"})


def curl_of(path: str, query: str, headers: Iterable[tuple[str, str]], body: bytes, *, file: str) -> str:
    """Return the command; `file` is the name of the body's file."""
    url = ADDRESS + path + (f"?{query}" if query else "")
    # In brackets curl would read a range or a list: a thousand requests of `x=[1-1000]`.
    parts = [f"curl {'--globoff ' if _RANGES.search(url) else ''}{quoted(url)}"]
    parts += [f"-H {quoted(f'{name}: {value}')}" for name, value in headers if name.lower() not in _OF_CONNECTION]
    parts.append(f"--data-binary {quoted(_inline(body) or f'@{file}')}" if body else "-X POST")
    return " \\\n  ".join(parts)


def _inline(body: bytes) -> str | None:
    """Return a body as curl's argument, None if it can't be one: `@` at its beginning would name a file."""
    if len(body) > MOST_INLINE or body[:1] == b"@" or b"\0" in body:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def quoted(text: str) -> str:
    """Return a text as one word of a shell (bash, zsh, ksh), all of whose characters can be seen."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join([_ESCAPES.get(each) or _visible(each) for each in text]) + "'"


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    # Three digits each: what follows can't become a part of an octal escape, as it could of one in hex.
    return "".join([f"\\{byte:03o}" for byte in character.encode("utf-8", "replace")])
