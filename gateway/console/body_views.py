"""An event's body as pages show it: laid out, as text, or its bytes; always so much of it and no more. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from markupsafe import Markup

from gateway.console.json_layout import Piece, laid_out
from gateway.console.text import marked
from gateway.ops.output import hex_dump
from gateway.turns import give_way

SHOWN_CHARACTERS = 32 << 10
"""Of a text on a page: what a browser lays out, and this process writes, in some milliseconds."""
SHOWN_BYTES = 4 << 10
"""Of which the hex view has 256 lines."""


class View(StrEnum):
    """How a body is shown."""

    PRETTY = "pretty"
    RAW = "raw"
    HEX = "hex"


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyView:
    """A body's markup, for a `<pre>`. `view` is how it is shown, which may be another than was asked for.

    `note` says why, or what is left out; "" if it is all there.
    """

    view: View
    markup: Markup
    is_whole: bool
    note: str


def view_of(body: bytes, asked: View | None) -> BodyView:
    """Return a body as asked for; None: as what fits it."""
    text = _text(body)
    if text is None:
        note = "" if asked in (View.HEX, None) else "It isn't UTF-8 text: these are its bytes."
        return _hex(body, note)
    if asked is View.HEX:
        return _hex(body, "")
    if asked is not View.RAW:
        layout = laid_out(text, longest=SHOWN_CHARACTERS)
        if layout is not None:
            return BodyView(view=View.PRETTY, markup=_pretty(layout.pieces), is_whole=layout.is_whole, note="")
        if asked is View.PRETTY:
            note = "It can't be laid out as JSON: this is its text." if body else ""
            return _raw(text, body, note)
    return _raw(text, body, "")


def _text(body: bytes) -> str | None:
    """Return the beginning of a body as text, a little more than is shown; None if it isn't UTF-8, or has zeros."""
    piece = body[: SHOWN_CHARACTERS * 8]
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        if len(piece) == len(body) or error.start < len(piece) - 3:  # a character of four bytes may be cut
            return None
        text = piece[: error.start].decode()
    return None if "\0" in text else text


def _raw(text: str, body: bytes, note: str) -> BodyView:
    is_whole = len(text) <= SHOWN_CHARACTERS and len(text.encode()) == len(body)
    return BodyView(view=View.RAW, markup=marked(text[:SHOWN_CHARACTERS], keep="\n\t"), is_whole=is_whole, note=note)


def _hex(body: bytes, note: str) -> BodyView:
    return BodyView(
        view=View.HEX,
        markup=marked(hex_dump(body[:SHOWN_BYTES]), keep="\n"),
        is_whole=len(body) <= SHOWN_BYTES,
        note=note,
    )


def _pretty(pieces: Sequence[Piece]) -> Markup:
    parts: list[str] = []
    for kind, text in pieces:
        give_way()
        shown = marked(text, keep="\n\t")
        parts.append(str(shown) if kind == "mark" else f'<span class="j-{kind}">{shown}</span>')
    return Markup("".join(parts))  # noqa: S704 - each part is escaped, and a kind is of a closed set


def download_name(event_id: str) -> str:
    """Return the name of the file for an event's body: of an id from outside, only what any system takes."""
    return (_UNSAFE.sub("_", event_id)[:80] or "event") + ".body"


_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
