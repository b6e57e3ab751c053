"""Our functions for expressions: those that CEL lacks, and those that replace its own (`timestamp`…).

Pure, and bounded: none returns more than `MAX_RESULT` characters or `MAX_ITEMS` elements. The cost of a call grows with
the size of its arguments (`cost`). docs/rules.md describes them.
"""

import base64
import hashlib
import hmac
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes
from zoneinfo import ZoneInfo

import orjson
from typing_extensions import override

from gateway.model import ExpressionError
from gateway.rules.json_values import as_json, dumps

MAX_RESULT = 1 << 20  # characters of a string
MAX_ITEMS = 10_000  # of a list
CHARACTERS_PER_COST_UNIT = 16
_DIRECTIVES = re.compile(r"[^%]|%[%aAbBdfHIjmMpSyYzZ]")
_PLACEHOLDER = re.compile(r"%(?:(%)|(s)|(d)|\.(\d)f)|%")
_WITH_QUOTES = re.compile(r'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_QUOTED = re.compile(r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CURRENCY = re.compile(r"[A-Za-z]{3}")
# Currencies whose minor unit isn't a hundredth (ISO 4217, list one).
_MINOR_UNITS = {
    **dict.fromkeys(("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI"), 0),
    **dict.fromkeys(("VND", "VUV", "XAF", "XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
_LAST_SECOND = 253_402_300_799  # the end of the year 9999
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OFFSET = re.compile(r"([+-]?)(\d\d):(\d\d)")
_DURATION = re.compile(r"[+-]?(?:0|(?:(?=\.?\d)\d{0,15}(?:\.\d{0,15})?(?:h|ms|m|s|us|µs|ns))+)")
_DURATION_PART = re.compile(r"([\d.]+)(h|ms|m|s|us|µs|ns)")
_SECONDS = {
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("1e-3"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ns": Decimal("1e-9"),
}
_MAX_DURATION = 315_576_000_000  # seconds, as of protocol buffers
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_BOOLEANS = {
    **dict.fromkeys(("true", "True", "TRUE", "t", "1"), True),
    **dict.fromkeys(("false", "False", "FALSE", "f", "0"), False),
}


class Function(NamedTuple):
    """A function: its implementation, its number of arguments (`least` to `most`), and whether it is a method."""

    call: Callable[..., object]
    least: int
    most: int
    is_method: bool
    base_cost: int = 20
    """Cost units (0.1 µs) for the smallest arguments."""
    weight: int = 1
    """Multiplier of the `cost` of its arguments."""


def cost(value: object) -> int:
    """Return the cost units for an argument or a result."""
    match value:
        case str() | bytes():
            return len(value) // CHARACTERS_PER_COST_UNIT
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
    longest = max([len(_shown(value)) for value in values], default=0) + 400  # for a number with nine decimals
    if len(pattern) + pattern.count("%") * longest > MAX_RESULT:
        raise _too_long()
    filled = _PLACEHOLDER.sub(fill, pattern)
    if next(left, None) is not None:
        raise ExpressionError("expected a %s, %d or %.2f for each value, got fewer")
    return filled


def _url(value: object) -> str:
    return _checked(quote(_shown(value), safe="", errors="replace"))


def _json(value: object) -> str:
    """Return JSON with sorted keys, since CEL passes the keys of a mapping in a random order."""
    try:
        return _checked(orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_SORT_KEYS).decode())
    except TypeError:  # for types that only CEL has
        return _checked(dumps(as_json(value)).decode())


def _ce_attribute(header: object) -> str:
    """Decode a CloudEvents attribute from its header in binary mode: unquote quoted strings, then percent-decode.

    https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md#3132-http-header-values
    """
    text = _text(header)
    if "\ufffd" in text:  # It replaces invalid bytes, so different values would look the same.
        raise ExpressionError("expected UTF-8, got other bytes")
    if '"' in text:
        if not _WITH_QUOTES.fullmatch(text):
            raise ExpressionError("expected the end of a quoted string, got none")
        text = _QUOTED.sub(lambda found: _ESCAPED.sub(r"\1", found[1]), text)
    if "%" not in text:
        return text
    if _NO_ESCAPE.search(text):
        raise ExpressionError("expected two hexadecimal digits after each %, got another character")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ExpressionError("expected percent-encoded UTF-8, got other bytes") from None


def _base64(value: object) -> str:
    return _checked(base64.b64encode(_bytes(value)).decode())


def _sha256(value: object) -> str:
    return hashlib.sha256(_bytes(value)).hexdigest()


class NamedSecret:
    """A secret that expressions use by its name. The key is never shown; it is None where secrets aren't resolved."""

    __slots__ = ("_key", "name")

    def __init__(self, name: str, key: bytes | None) -> None:
        self.name = name
        self._key = key

    def digest(self, value: str | bytes) -> str:
        """Return HMAC-SHA256 (RFC 2104) in hex. Without the key, return a placeholder that differs for each value."""
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
    """Format an amount that is given in the currency's smallest unit: `money(1999, 'usd')` is `19.99 USD`."""
    code = _text(currency).upper()
    if not _CURRENCY.fullmatch(code):
        raise ExpressionError("expected a currency of three letters, as ISO 4217 has them")
    digits = _MINOR_UNITS.get(code, 2)
    return f"{Decimal(_whole_number(amount)).scaleb(-digits):.{digits}f} {code}"


def _date(value: object, pattern: object = "%Y-%m-%d %H:%M", zone: object = "UTC") -> str:
    text, name = _text(pattern), _text(zone)
    if len(text) > 100 or not re.fullmatch(f"(?:{_DIRECTIVES.pattern})*", text, re.DOTALL):  # noqa: PLR2004 - a line
        raise ExpressionError("expected a format of at most 100 characters, with %Y %m %d %H %M %S and the like")
    local = _timestamp(value).astimezone(_zone_of(name))
    return _DIRECTIVES.sub(lambda found: local.strftime(found[0]) if len(found[0]) > 1 else found[0], text)


def _zone_of(name: str) -> tzinfo:
    """Return the time zone for an IANA name, or for an offset such as `+02:00`, which CEL has as well."""
    if offset := _OFFSET.fullmatch(name):
        sign, hours, minutes = offset.groups()
        ahead = timedelta(hours=int(hours), minutes=int(minutes))
        if ahead < timedelta(days=1):
            return timezone(-ahead if sign == "-" else ahead)
    try:
        return _zone(name)
    except (KeyError, OSError, ValueError):
        raise ExpressionError("expected a time zone such as Europe/Berlin") from None


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    """Return a time zone. The first call for each of about 600 names reads a file."""
    return ZoneInfo(name)


def _timestamp(value: object) -> datetime:
    """Convert an RFC 3339 string to a time, or Unix seconds as a number or digits."""
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


def _duration(value: object) -> timedelta:
    """Convert a string such as `1h30m` or `-1.5s` to a duration, truncated to microseconds."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or len(value) > 100 or not _DURATION.fullmatch(value):  # noqa: PLR2004 - a line
        raise ExpressionError("expected a string such as '90s' or '1h30m'")
    parts = _DURATION_PART.findall(value)
    seconds = sum([Decimal(number) * _SECONDS[unit] for number, unit in parts], Decimal())
    if seconds > _MAX_DURATION:
        raise ExpressionError("expected at most 10,000 years")
    return timedelta(microseconds=int(seconds.scaleb(6))) * (-1 if value.startswith("-") else 1)


def _string(value: object) -> str:
    match value:
        case str():
            return value
        case int():  # or a boolean
            return str(value).lower()
        case float() if math.isfinite(value):
            return f"{Decimal(repr(value)):f}".removesuffix(".0")
        case float():
            return "NaN" if math.isnan(value) else f"{value:f}"
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise ExpressionError("expected UTF-8, got other bytes") from None
        case datetime() | timedelta():
            return _shown(value)
        case _:
            raise ExpressionError("expected a string, number, boolean, time, duration or bytes")


def _int(value: object) -> int:
    """Return an integer of 64 bits; a time is its Unix seconds."""
    match value:
        case bool():
            number = None
        case int():
            number = value
        case float() if math.isfinite(value):
            number = int(value)
        case str() if _INTEGER.fullmatch(value):
            number = int(value)
        case datetime():
            number = (value - _EPOCH) // timedelta(seconds=1)
        case _:
            number = None
    if number is None:
        raise ExpressionError("expected an integer as a string, a number or a time")
    if not -(2**63) <= number < 2**63:
        raise ExpressionError("expected an integer of 64 bits, got a larger one")
    return number


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    found = _BOOLEANS.get(_text(value))
    if found is None:
        raise ExpressionError("expected 'true' or 'false'")
    return found


_TIME_PARTS: Mapping[str, Callable[[datetime], int]] = {
    "getDate": lambda at: at.day,
    "getDayOfMonth": lambda at: at.day - 1,
    "getDayOfWeek": lambda at: at.isoweekday() % 7,
    "getDayOfYear": lambda at: at.timetuple().tm_yday - 1,
    "getFullYear": lambda at: at.year,
    "getHours": lambda at: at.hour,
    "getMilliseconds": lambda at: at.microsecond // 1000,
    "getMinutes": lambda at: at.minute,
    "getMonth": lambda at: at.month - 1,
    "getSeconds": lambda at: at.second,
}
_DURATION_PARTS: Mapping[str, Callable[[timedelta], int]] = {
    "getHours": lambda length: length // timedelta(hours=1),
    "getMilliseconds": lambda length: length.microseconds // 1000,
    "getMinutes": lambda length: length // timedelta(minutes=1),
    "getSeconds": lambda length: length // timedelta(seconds=1),
}
"""The parts of times and durations by their CEL names. All but `getDate` and the year count from 0."""


def _part(name: str, value: object, zone: object = None) -> int:
    """Return a part of a time, in a time zone (UTC by default), or a whole duration in hours, minutes or seconds."""
    if isinstance(value, datetime):
        return _TIME_PARTS[name](value.astimezone(UTC if zone is None else _zone_of(_text(zone))))
    if not isinstance(value, timedelta) or name not in _DURATION_PARTS or zone is not None:
        raise ExpressionError("expected a time, such as timestamp(body.at)")
    return _DURATION_PARTS[name](abs(value)) * (-1 if value < timedelta() else 1)


FUNCTIONS: Mapping[str, Function] = {
    **{name: Function(partial(_part, name), 1, 2, is_method=True) for name in _TIME_PARTS},
    "base64": Function(_base64, 1, 1, is_method=False),
    "bool": Function(_bool, 1, 1, is_method=False),
    "ceAttribute": Function(_ce_attribute, 1, 1, is_method=False, weight=16),
    "date": Function(_date, 1, 3, is_method=False, base_cost=300),
    "duration": Function(_duration, 1, 1, is_method=False),
    "format": Function(_format, 2, 2, is_method=True),
    "int": Function(_int, 1, 1, is_method=False),
    "join": Function(_join, 1, 2, is_method=True),
    "json": Function(_json, 1, 1, is_method=False),
    "lower": Function(_lower, 1, 1, is_method=True),
    "money": Function(_money, 2, 2, is_method=False),
    "replace": Function(_replace, 3, 3, is_method=True),
    "sha256": Function(_sha256, 1, 1, is_method=False),
    "split": Function(_split, 2, 2, is_method=True),
    "string": Function(_string, 1, 1, is_method=False),
    "substring": Function(_substring, 2, 3, is_method=True),
    "timestamp": Function(_timestamp, 1, 1, is_method=False),
    "trim": Function(_trim, 1, 1, is_method=True),
    "truncate": Function(_truncate, 2, 2, is_method=True),
    "upper": Function(_upper, 1, 1, is_method=True),
    "url": Function(_url, 1, 1, is_method=False, weight=8),
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
    if isinstance(value, datetime | timedelta | bytes):
        return str(as_json(value))
    return value if isinstance(value, str) else _json(value)


def _checked(text: str) -> str:
    if len(text) > MAX_RESULT:
        raise _too_long()
    return text


def _too_long() -> ExpressionError:
    return ExpressionError(f"expected a result of at most {MAX_RESULT:,} characters, got a longer one")
