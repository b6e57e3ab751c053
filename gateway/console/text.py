"""How what comes from outside is shown on a page: text that is always text, times, sizes, addresses of pages. Pure.

Nothing of it can be markup, end an attribute, or change the direction of what is around it: what isn't seen by itself
(controls, direction marks, bytes that aren't UTF-8) is shown as its escape.
"""

import re
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from itertools import groupby
from urllib.parse import quote, urlencode

from markupsafe import Markup, escape

from gateway.telemetry.logs import printable
from gateway.turns import give_way

UI = "/ui"
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
KIB = 1024


def plain(text: str, *, keep: str = "") -> str:
    """Return a text with what isn't seen as its escape, for attributes and titles."""
    return printable(text, keep=keep)


def shown(text: object, *, keep: str = "") -> Markup:
    """Return a text as markup that shows just that text: escapes of what isn't seen are marked as such.

    It has a direction of its own, so that right-to-left text doesn't turn around what is beside it.
    """
    return Markup("<bdi>{}</bdi>").format(marked(str(text), keep=keep))


def marked(text: str, *, keep: str = "") -> Markup:
    """Return a text as markup, without a direction of its own."""
    if text.isprintable():
        return escape(text)
    parts: list[str] = []
    for is_seen, characters in groupby(text, lambda each: each.isprintable() or each in keep):
        give_way()
        run = "".join(characters)
        parts.append(str(escape(run)) if is_seen else f'<span class="unseen">{printable(run)}</span>')
    return Markup("".join(parts))  # noqa: S704 - each part is escaped: escapes of what isn't seen are plain ASCII


def area(text: str) -> Markup:
    """Return a text as it is in a field that is edited: only what HTML can't have in it is replaced."""
    return escape(_NOT_HTML.sub("\N{REPLACEMENT CHARACTER}", text))


_NOT_HTML = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def address(*segments: str, **query: object) -> str:
    """Return the address of a page below `/ui`; parameters that are None, False or "" are left out."""
    path = "/".join([UI, *[quote(each, safe="", errors="backslashreplace") for each in segments]])
    asked = {
        name: "1" if value is True else str(value) for name, value in query.items() if value not in (None, False, "")
    }
    return f"{path}?{urlencode(asked, quote_via=quote, errors='backslashreplace')}" if asked else path


def unix(time: str) -> float:
    """Return a time of the API (RFC 3339) in Unix seconds."""
    return datetime.fromisoformat(time).timestamp()


def exact(time: str) -> str:
    """Return a time of the API for people, to the millisecond, in UTC."""
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"[:-3] + " UTC"


def moment(time: str | None, now: float, *, words: str = "relative") -> Markup:
    """Return a time as markup: how long ago it was or in how long it will be, with the exact one beside it.

    `words` is "relative", "time" (of the day, in UTC), "clock" (the same with milliseconds) or "exact".
    """
    if time is None:
        return Markup('<span class="quiet">\N{EN DASH}</span>')
    whole = exact(time)
    match words:
        case "exact":
            text = whole
        case "clock":
            text = whole[11:23]
        case "time":
            text = whole[11:19]
        case _:
            text = relative(unix(time) - now)
    mark = Markup(" data-relative") if words == "relative" else ""
    return Markup('<time datetime="{}" title="{}"{}>{}</time>').format(time, whole, mark, text)


def relative(seconds: float) -> str:
    """Return how long ago something was (negative), or in how long it will be, in one unit."""
    size = abs(seconds)
    if size < 1:
        return "now"
    text = next(f"{int(size // unit)} {name}" for unit, name in _UNITS if size >= unit)
    return f"in {text}" if seconds > 0 else f"{text} ago"


def duration(seconds: float) -> str:
    """Return a duration: `12 ms`, `1.50 s`, `2 min 5 s`, `3 d 4 h`."""
    if seconds < 0.9995:  # noqa: PLR2004 - below, it is rounded to milliseconds
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:  # noqa: PLR2004 - two more digits say something
        return f"{seconds:.2f} s".replace(".00 ", " ")
    left, parts = round(seconds), list[str]()
    for unit, name in _UNITS:
        if left >= unit and len(parts) < 2:  # noqa: PLR2004 - the third unit is noise
            parts.append(f"{int(left // unit)} {name}")
            left -= int(left // unit) * int(unit)
        elif parts:
            break
    return " ".join(parts)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    if number < KIB:
        return f"{number:,} B"
    value, unit = number / KIB, "KiB"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        if value < KIB or unit == "TiB":
            break
        value /= KIB
    return f"{value:,.1f} {unit}".replace(".0 ", " ")


def anchor(name: str) -> str:
    """Return the id of an element for something with a name from outside."""
    return "x" + urlsafe_b64encode(sha256(name.encode("utf-8", "surrogatepass")).digest()[:9]).decode()


_FIELD = re.compile(r"[A-Za-z0-9_./-]+")


def term(field: str, value: str) -> str:
    """Return a condition of the search language: a value that would read as something else is quoted."""
    if value and _FIELD.fullmatch(value):
        return f"{field}:{value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{field}:"{escaped}"'


def plural(number: int, one: str, many: Mapping[str, str] | None = None) -> str:
    """Return `1 attempt`, `2 attempts`."""
    return f"{number:,} {one if number == 1 else (many or {}).get(one, one + 's')}"
