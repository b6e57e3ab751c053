"""Typed access to JSON fields of records: a value of another type raises UndecodableRecordError.

Anybody who may write to a topic may write anything: a list for a string, a time of 1e308. A value that passes here can
safely be encoded again, compared and added.
"""

import re
from collections.abc import Iterator

import orjson

from gateway.model import NewerRecordError, UndecodableRecordError

LATEST = 253_402_300_800.0
"""Unix seconds at the end of the year 9999, the latest that `datetime` can represent."""
MAX_SAFE_INTEGER = 1 << 53
"""Any JSON parser represents integers up to this one exactly."""
ID = re.compile(r"[!-~]{1,255}")
"""Ids are sent in headers, so they contain neither blanks nor control characters."""
PARTITION_NAME = re.compile(r"(?!\.{1,2}/)[a-zA-Z0-9._-]{1,249}/(0|[1-9][0-9]{0,8})")
"""A topic that Kafka allows (not `.` or `..`), and a partition's number."""
_DIGITS = re.compile(rb"[1-9][0-9]{0,8}")


class JsonFields:
    """A JSON object whose fields are read by name and type. `where` names it in error messages."""

    __slots__ = ("_fields", "where")

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise UndecodableRecordError(where, "an object", value)
        self.where = where
        self._fields: dict[str, object] = value

    @classmethod
    def parse(cls, where: str, raw: bytes | None) -> "JsonFields":
        """Read JSON."""
        try:
            return cls(where, None if raw is None else orjson.loads(raw))
        except ValueError as error:
            raise UndecodableRecordError(where, "JSON", raw) from error

    def names(self) -> Iterator[str]:
        return iter(self._fields)

    def has(self, name: str) -> bool:
        """Return whether there is such a field, and it isn't null."""
        return self._fields.get(name) is not None

    def allow(self, *names: str) -> None:
        """Refuse fields with other names, since their meaning would be ignored."""
        for name in self._fields:
            if name not in names:
                raise UndecodableRecordError(f"{self.where}.{name}", "no such field", self._fields[name])

    def text(self, name: str, *, like: re.Pattern[str] | None = None, expected: str = "a string") -> str:
        """Return a string, which the pattern, if there is one, has to match completely."""
        value = self._fields.get(name)
        if not isinstance(value, str) or (like is not None and not like.fullmatch(value)):
            raise self.error(name, expected)
        return value

    def integer(self, name: str, *, minimum: int = 0, maximum: int = MAX_SAFE_INTEGER) -> int:
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(name, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, name: str, *, maximum: float = LATEST) -> float:
        """Return a number of at least 0 and below `maximum`: a time or a duration, in seconds."""
        value = self._fields.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < maximum:
            raise self.error(name, f"a number from 0 to {maximum:.0f}")
        return float(value)

    def inside(self, name: str) -> "JsonFields":
        """Return a field that is an object."""
        return JsonFields(f"{self.where}.{name}", self._fields.get(name))

    def each(self, name: str) -> Iterator["JsonFields"]:
        """Yield the objects of a field that is a list."""
        for index, value in enumerate(self._list(name)):
            yield JsonFields(f"{self.where}.{name}[{index}]", value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a list of strings."""
        found: list[str] = []
        for index, value in enumerate(self._list(name)):
            if not isinstance(value, str):
                raise UndecodableRecordError(f"{self.where}.{name}[{index}]", "a string", value)
            found.append(value)
        return tuple(found)

    def error(self, name: str, expected: str) -> UndecodableRecordError:
        """Return the exception to raise for a field."""
        return UndecodableRecordError(f"{self.where}.{name}", expected, self._fields.get(name))

    def _list(self, name: str) -> list[object]:
        value = self._fields.get(name)
        if not isinstance(value, list):
            raise self.error(name, "a list")
        return value


def check_format(where: str, got: bytes | None, known: int) -> None:
    """Raise NewerRecordError for a format above the known one, and UndecodableRecordError for any other text."""
    if got is None or not _DIGITS.fullmatch(got) or int(got) < known:
        raise UndecodableRecordError(where, str(known), got)
    if int(got) > known:
        raise NewerRecordError(where, int(got), known)
