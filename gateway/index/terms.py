"""The terms by which an event is found: whole tokens, one a line, as FTS5 stores them and queries name them.

    *                                   every event
    source:github  type:push  key:…     what the gateway knows of it
    body.repository.full_name:acme/app  a field of the body; a list's items share its path
    =acme/app  =acme  =app              a piece of the body's text between blanks, and the words in it

Case is folded, blanks inside a term are written as `␠`, and a long value is cut and told apart by a digest of it all.
"""

import hashlib
import re
from collections import deque
from typing import NamedTuple

from gateway.bodies.codings import decompressed
from gateway.bodies.content import read
from gateway.bodies.redaction import Redaction
from gateway.model import Event, UnreadableBodyError
from gateway.turns import give_way

EVERY = "*"
MAX_TEXT = 96
"""Characters of a value, or of a piece of text, that a term has as they are."""
MAX_PATH = 256
"""Characters of a path: what is deeper is found by its text alone."""
MAX_CHARACTERS = 128 << 10
"""Of the text of an event's body: what comes after is not found."""
MAX_FIELDS = 4096
"""Of a body that are found by path and value."""
CONTAINERS_A_TURN = 256
PATHS_KEPT = 8192
"""Paths that are kept as terms have them: most bodies have the same."""
PUNCTUATION = ".,;:!?()[]{}<>\"'`\u2018\u2019\u201c\u201d«»…¿¡"
"""What is no part of a piece of text at its beginning and end."""
TOKEN_CHARACTERS = "".join([chr(code) for code in range(0x21, 0x7F) if not chr(code).isalnum()])
"""The ASCII characters that FTS5 wouldn't take for parts of a term by itself."""

_BLANK = "␠"
_CUT = "…"
_UNSAFE = re.compile(r"[\x00-\x20\x7f]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]+")
"""What of these doesn't separate pieces."""
_WORD = re.compile(r"\w+")
_ROOT = len("body")
_CONTAINERS = (dict, list)
_CONSTANTS = {None: "null", True: "true", False: "false"}
_MAX_EXACT = 1e15
"""Floats below it that are whole have no other notation as integers."""


class Terms(NamedTuple):
    """The terms of an event, one a line; `is_cut`: whether its body has more than can be found."""

    text: str
    is_cut: bool


def terms_of(event: Event, redaction: Redaction | None = None) -> Terms:
    """Return the terms of an event, but for what is hidden of its body.

    Takes about 0.1 ms for 2 kB, and gives way to the event loop where it's more.
    """
    names = [EVERY, term("source", event.source), term("type", event.type)]
    if event.key is not None:
        names.append(term("key", event.key))
    content = _content(event) if redaction is None or not redaction.body else _seen_content(event, redaction)
    text = "\n".join(content.texts)
    is_cut = content.is_cut or len(text) > MAX_CHARACTERS
    pieces = _pieces(text[:MAX_CHARACTERS], is_plain=content.is_plain)
    lines = "\n".join([*names, *content.fields])
    return Terms(lines + "\n=" + "\n=".join(pieces) if pieces else lines, is_cut)


def term(name: str, value: str) -> str:
    """Return the term of a field; `name` is its path in the body, or what the gateway knows of the event."""
    return f"{_safe(name)}:{_bounded(value)}"


def text_term(text: str) -> str:
    """Return the term of a piece of text."""
    return f"={_bounded(text)}"


def _safe(text: str) -> str:
    """Return a text as part of a term: folded, without blanks and controls, and valid UTF-8."""
    if text.isascii():
        return text if text.isprintable() and " " not in text else _UNSAFE.sub(_BLANK, text)  # FTS5 folds ASCII itself
    return _UNSAFE.sub(_BLANK, text.casefold().encode("utf-8", "replace").decode())


def _bounded(text: str) -> str:
    safe = _safe(text)
    if len(safe) <= MAX_TEXT:
        return safe
    digest = hashlib.blake2b(safe.casefold().encode(), digest_size=8).hexdigest()
    return f"{safe[:MAX_TEXT]}{_CUT}{digest}"


def _pieces(text: str, *, is_plain: bool) -> set[str]:
    """Return the pieces of a text, and the words in them, as parts of terms. `is_plain`: it has no controls."""
    folded = text.casefold()
    if not is_plain:
        folded = _CONTROLS.sub(_BLANK, folded).encode("utf-8", "replace").decode()
    pieces = set(folded.split())
    if mixed := [piece for piece in pieces if not piece.isalnum()]:
        pieces.difference_update(mixed)
        pieces.update(_WORD.findall(" ".join(mixed)))
        pieces.update([piece.strip(PUNCTUATION) for piece in mixed])
        pieces.discard("")
    if max(map(len, pieces), default=0) > MAX_TEXT:
        return {_bounded(piece) for piece in pieces}
    return pieces


class _Content(NamedTuple):
    """What a body has: the terms of its fields, its texts; whether there is more, and no control in a text."""

    fields: list[str]
    texts: list[str]
    is_cut: bool
    is_plain: bool


def _content(event: Event) -> _Content:
    """Return what a body has: a binary one, nothing."""
    kind = coding = ""
    for name, value in event.headers:
        length = len(name)
        if length == 12 and name.lower() == b"content-type":  # noqa: PLR2004 - the length of that
            kind = kind or value.decode("latin-1")
        elif length == 16 and name.lower() == b"content-encoding":  # noqa: PLR2004 - the length of that
            coding = coding or value.decode("latin-1")
    try:
        content = read(event.body, coding, kind)
    except UnreadableBodyError:
        return _Content([], _plain_text(event.body, coding), is_cut=False, is_plain=False)
    return _content_of(content)


def _seen_content(event: Event, redaction: Redaction) -> _Content:
    """Return what a body has besides what is hidden of it: one that can't be read has nothing."""
    try:
        content = redaction.content(event.headers, event.body)
    except UnreadableBodyError:
        return _Content([], [], is_cut=False, is_plain=False)
    return _content_of(content)


def _plain_text(body: bytes, coding: str) -> list[str]:
    """Return the text of a body that has no fields, if it is one."""
    try:
        text = (decompressed(body, coding) if coding else body).decode()
    except (UnreadableBodyError, UnicodeDecodeError):
        return []
    return [] if "\0" in text else [text]


def _content_of(root: object) -> _Content:
    """Return what a value of JSON's types has."""
    leaves, is_cut = _leaves(root)
    fields, texts = list[str](), list[str]()
    is_plain = True
    for name, value in leaves:
        if isinstance(value, str):
            texts.append(value)
            text = value
            if not text.isascii() or not text.isprintable():
                is_plain, text = False, _bounded(text)
            elif len(text) > MAX_TEXT or " " in text:
                text = _bounded(text)
        elif value is None or isinstance(value, bool):
            text = _CONSTANTS[value]
        else:
            text = _number(value)
            texts.append(text)
        if len(name) > _ROOT:
            fields.append(f"{name}:{text}")
    return _Content(fields, texts, is_cut, is_plain)


def _leaves(root: object) -> tuple[list[tuple[str, object]], bool]:
    """Return all values that are no containers, with their paths; and whether these are only some.

    Each container is looked at once, the outer ones first.
    """
    leaves = list[tuple[str, object]]()
    waiting: deque[tuple[str, object]] = deque([("body", root)])
    visited = 0
    while waiting and len(leaves) <= MAX_FIELDS:
        visited += 1
        if visited % CONTAINERS_A_TURN == 0:
            give_way()
        path, container = waiting.popleft()
        if isinstance(container, dict):
            for key, value in container.items():
                name = _paths.get((path, key)) or _path(path, key)
                (waiting if isinstance(value, _CONTAINERS) else leaves).append((name, value))
        elif isinstance(container, list):
            for value in container:
                (waiting if isinstance(value, _CONTAINERS) else leaves).append((path, value))
        else:
            leaves.append((path, container))
    return leaves[:MAX_FIELDS], bool(waiting) or len(leaves) > MAX_FIELDS


def _path(path: str, key: str) -> str:
    """Return the path of a key's value, "" if that is too long."""
    name = f"{path}.{_safe(key)}" if path and len(path) + len(key) < MAX_PATH else ""
    if len(_paths) >= PATHS_KEPT:
        _paths.clear()
    if name:
        _paths[path, key] = name
    return name


_paths: dict[tuple[str, str], str] = {}


def _number(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < _MAX_EXACT:
        return str(int(value))
    return str(value)
