"""Functions of expressions that messages need, beside those of CEL: text, numbers and times for people, encodings.

Pure, and bounded: none returns more than `MAX_RESULT` characters or `MAX_ITEMS` items, and each takes a time that grows
with the size of its arguments, by which it is charged (`cost`). docs/rules.md describes them.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote
from zoneinfo import ZoneInfo

import orjson
from typing_extensions import override

from gateway.model import ExpressionError

MAX_RESULT = 1 << 20  # characters of a string
MAX_ITEMS = 10_000  # of a list
CHARACTERS_IN_A_STEP = 16
_DIRECTIVES = re.compile(r"[^%]|%[%aAbBdfHIjmMpSyYzZ]")
_PLACEHOLDER = re.compile(r"%(?:(%)|(s)|(d)|\.(\d)f)|%")
_CURRENCY = re.compile(r"[A-Za-z]{3}")
# Currencies whose minor unit isn't a hundredth (ISO 4217, list one).
_MINOR_UNITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI"), 0),
    **dict.fromkeys(("VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
_LAST_SECOND = 253_402_300_799  # of the year 9999


class Function(NamedTuple):
    """A function by name: how it is called in Python, with how many arguments, as a method of the first one or not."""

    call: Callable[..., object]
    least: int
    most: int
    is_method: bool
    steps: int = 20
    """Steps of 0.1 µs for the smallest arguments."""


def cost(value: object) -> int:
    """Return the steps for an argument or a result of this size."""
    match value:
        case str() | bytes():
            return len(value) // CHARACTERS_IN_A_STEP
        case list():
            return sum([10 + cost(item) for item in value])
        case dict():
            return sum([10 + cost(key) + cost(item) for key, item in value.items()])
        case _:
            return 0


def _lower(text: object) -> str:
    return _text(text).lower()


def _upper(text: object) -> str:
    return _checked(_text(text).upper())


def _trim(text: object) -> str:
    return _text(text).strip()


def _split(text: object, separator: object) -> list[str]:
    by = _text(separator)
    if not by:
        raise ExpressionError("expected a separator, got an empty string")
    parts = _text(text).split(by, MAX_ITEMS)
    if len(parts) > MAX_ITEMS:
        raise ExpressionError(f"expected at most {MAX_ITEMS:,} parts, got more")
    return parts


def _substring(text: object, start: object, end: object = None) -> str:
    whole, first = _text(text), _whole_number(start)
    last = len(whole) if end is None else _whole_number(end)
    if not 0 <= first <= last <= len(whole):
        raise ExpressionError(f"expected positions within the string's {len(whole):,} characters, got others")
    return whole[first:last]


def _replace(text: object, old: object, new: object) -> str:
    whole, before, after = _text(text), _text(old), _text(new)
    if not before:
        raise ExpressionError("expected a string to replace, got an empty one")
    if len(whole) + whole.count(before) * (len(after) - len(before)) > MAX_RESULT:
        raise _too_long()
    return whole.replace(before, after)


def _join(items: object, separator: object = "") -> str:
    if not isinstance(items, list):
        raise ExpressionError("expected a list")
    texts, by = list(map(_shown, items)), _text(separator)
    if sum(map(len, texts)) + len(by) * len(texts) > MAX_RESULT:
        raise _too_long()
    return by.join(texts)


def _truncate(text: object, most: object) -> str:
    whole, length = _text(text), _whole_number(most)
    if length < 1:
        raise ExpressionError("expected at least 1 character, got fewer")
    return whole if len(whole) <= length else whole[: length - 1] + "…"


def _format(text: object, values: object) -> str:
    """Fill in `%s`, `%d`, `%.2f` and `%%`, in order."""
    if not isinstance(values, list):
        raise ExpressionError("expected the values as a list")
    left = iter(values)

    def fill(found: re.Match[str]) -> str:
        percent, text, integer, digits = found.groups()
        if percent:
            return "%"
        try:
            value = next(left)
        except StopIteration:
            raise ExpressionError("expected a value for each %s, %d and %.2f, got fewer") from None
        if text:
            return _shown(value)
        if integer:
            return str(_whole_number(value))
        if digits:
            return f"{_number(value):.{digits}f}"
        raise ExpressionError("expected %s, %d, %.2f or %%, got another %")

    pattern = _text(text)
    longest = max([len(_shown(value)) for value in values], default=0) + 400  # of a number with nine decimals
    if len(pattern) + pattern.count("%") * longest > MAX_RESULT:
        raise _too_long()
    filled = _PLACEHOLDER.sub(fill, pattern)
    if next(left, None) is not None:
        raise ExpressionError("expected a %s, %d or %.2f for each value, got fewer")
    return filled


def _url(value: object) -> str:
    return _checked(quote(_shown(value), safe="", errors="replace"))


def _json(value: object) -> str:
    try:
        return _checked(orjson.dumps(value, option=orjson.OPT_UTC_Z).decode())
    except TypeError:
        raise ExpressionError("expected a value that JSON has") from None


def _base64(value: object) -> str:
    return _checked(base64.b64encode(_bytes(value)).decode())


def _sha256(value: object) -> str:
    return hashlib.sha256(_bytes(value)).hexdigest()


class NamedSecret:
    """A secret of the rules, by its name in expressions; its key is never shown. None if it isn't known here."""

    __slots__ = ("_key", "name")

    def __init__(self, name: str, key: bytes | None) -> None:
        self.name = name
        self._key = key

    def digest(self, value: str | bytes) -> str:
        """Return HMAC-SHA256 (RFC 2104) in hex; of an unknown key, a text that says so, and for which value it is."""
        content = _bytes(value)
        if self._key is None:
            return f"hmac-by-{self.name}-{hashlib.sha256(content).hexdigest()[:16]}"
        return hmac.digest(self._key, content, "sha256").hex()

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedSecret) and (self.name, self._key) == (other.name, other._key)

    @override
    def __hash__(self) -> int:
        return hash(self.name)

    @override
    def __repr__(self) -> str:
        return f"NamedSecret({self.name!r})"


def _money(amount: object, currency: object) -> str:
    """Write an amount in the currency's smallest unit as people do: `money(1999, 'usd')` is `19.99 USD`."""
    code = _text(currency).upper()
    if not _CURRENCY.fullmatch(code):
        raise ExpressionError("expected a currency of three letters, as ISO 4217 has them")
    digits = _MINOR_UNITS.get(code, 2)
    return f"{Decimal(_whole_number(amount)).scaleb(-digits):.{digits}f} {code}"


def _date(value: object, pattern: object = "%Y-%m-%d %H:%M", zone: object = "UTC") -> str:
    text, name = _text(pattern), _text(zone)
    if len(text) > 100 or not re.fullmatch(f"(?:{_DIRECTIVES.pattern})*", text, re.DOTALL):  # noqa: PLR2004 - a line
        raise ExpressionError("expected a format of at most 100 characters, with %Y %m %d %H %M %S and the like")
    at = _timestamp(value)
    try:
        local = at.astimezone(_zone(name))
    except (KeyError, OSError, ValueError):
        raise ExpressionError("expected a time zone such as Europe/Berlin") from None
    return _DIRECTIVES.sub(lambda found: local.strftime(found[0]) if len(found[0]) > 1 else found[0], text)


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    """Return a time zone, which is a file the first time; there are some 600."""
    return ZoneInfo(name)


def _timestamp(value: object) -> datetime:
    """Return a time: of an RFC 3339 string, or of Unix seconds as a number or digits."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:  # noqa: PLR2004 - the year 9999
        value = int(value)
    if isinstance(value, str):
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            found = None
        if found is None or found.tzinfo is None or "T" not in value.upper():
            raise ExpressionError("expected an RFC 3339 time, such as 2026-01-02T03:04:05Z")
        return found.astimezone(UTC)
    seconds = _number(value)
    if not -62_135_596_800 <= seconds <= _LAST_SECOND:  # noqa: PLR2004 - of the year 1
        raise ExpressionError("expected Unix seconds of the years 1 to 9999, got others (of milliseconds, x / 1000)")
    return datetime.fromtimestamp(seconds, UTC)


FUNCTIONS: Mapping[str, Function] = {
    "base64": Function(_base64, 1, 1, is_method=False),
    "date": Function(_date, 1, 3, is_method=False, steps=300),
    "format": Function(_format, 2, 2, is_method=True),
    "join": Function(_join, 1, 2, is_method=True),
    "json": Function(_json, 1, 1, is_method=False),
    "lower": Function(_lower, 1, 1, is_method=True),
    "money": Function(_money, 2, 2, is_method=False),
    "replace": Function(_replace, 3, 3, is_method=True),
    "sha256": Function(_sha256, 1, 1, is_method=False),
    "split": Function(_split, 2, 2, is_method=True),
    "substring": Function(_substring, 2, 3, is_method=True),
    "timestamp": Function(_timestamp, 1, 1, is_method=False),
    "trim": Function(_trim, 1, 1, is_method=True),
    "truncate": Function(_truncate, 2, 2, is_method=True),
    "upper": Function(_upper, 1, 1, is_method=True),
    "url": Function(_url, 1, 1, is_method=False),
}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ExpressionError("expected a string")
    return value


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else _text(value).encode("utf-8", "surrogatepass")


def _whole_number(value: object) -> int:
    number = _number(value)
    if number != int(number):
        raise ExpressionError("expected an integer")
    return int(number)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**63:
        raise ExpressionError("expected a number")
    return value


def _shown(value: object) -> str:
    """Return a value as a template inserts it into a string."""
    return value if isinstance(value, str) else _json(value)


def _checked(text: str) -> str:
    if len(text) > MAX_RESULT:
        raise _too_long()
    return text


def _too_long() -> ExpressionError:
    return ExpressionError(f"expected a result of at most {MAX_RESULT:,} characters, got a longer one")
