r"""The query language of searches: text → `Query`.

    source:github type:push -status:delivered since:2h body.repository.full_name:acme/app "round totals"

A query is a list of conditions, all of which must hold; one that begins with `-` must not. A condition is a field and
a value, or text that the body has:

    source, type, route, destination, status, id    exact; several values with commas are alternatives
    key, identity                                   exact; `identity` is the sender's own id
    body.PATH                                       the value of a field of the body; a list's items share its path
    since, until                                    a duration before now (`2h`), or a time (`2026-11-30T20:00Z`)
    TEXT                                            a word of the body, or a piece between blanks

Case doesn't matter, except in ids and identities. A `*` at the end of a source, type, key, value or text stands for any
rest. In double quotes everything is text, with `\"` and `\\` for these two; several words in quotes must all be there.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from gateway.index.statuses import Status
from gateway.index.terms import MAX_TEXT, PUNCTUATION
from gateway.model import UsageError
from gateway.text import did_you_mean, parse_duration, shown

MAX_QUERY = 4096
"""Characters of a query."""
MAX_VALUES = 64
"""Values and words of a query."""
MAX_PREFIXES = 4
"""Values and words of a query that end in `*`: each gathers whatever begins so, of which there may be everything."""


class QueryError(UsageError):
    """The query is at fault. `str()` has one problem per line, with its column."""


class Field(StrEnum):
    """What a condition is about."""

    SOURCE = "source"
    TYPE = "type"
    KEY = "key"
    ID = "id"
    IDENTITY = "identity"
    ROUTE = "route"
    DESTINATION = "destination"
    STATUS = "status"
    BODY = "body"
    TEXT = "text"


class Value(NamedTuple):
    """What is looked for: all of a value, or with `is_prefix` its beginning."""

    text: str
    is_prefix: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One of `values` is there, or with `is_negated` none. `path` is that of a field of the body: `body.…`."""

    field: Field
    values: tuple[Value, ...]
    path: str = ""
    is_negated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Conditions that must all hold, of events appended from `since` until before `until` (Unix seconds)."""

    conditions: tuple[Condition, ...] = ()
    since: float = 0.0
    until: float = math.inf


def parse_query(text: str, *, now: float) -> Query:
    """Read a query; durations count back from `now`. Raises QueryError with all problems."""
    if len(text) > MAX_QUERY:
        raise QueryError(f"query: expected at most {MAX_QUERY} characters, got {len(text)}")
    if not is_unicode(text):
        raise QueryError("query: expected text in UTF-8, got other bytes")
    problems: list[str] = []
    conditions: list[Condition] = []
    since, until = 0.0, math.inf
    for word in _words(text):
        try:
            part = _part(word, now)
        except _ProblemError as problem:
            problems.append(f"query:{word.column}: {problem}")
            continue
        if isinstance(part, _Time):
            since, until = (max(since, part.at), until) if part.is_since else (since, min(until, part.at))
        else:
            conditions += part
    if (count := sum([len(each.values) for each in conditions])) > MAX_VALUES:
        problems.append(f"query: expected at most {MAX_VALUES} values, got {count}")
    asked = tuple(dict.fromkeys([replace(each, values=tuple(dict.fromkeys(each.values))) for each in conditions]))
    if (count := sum([value.is_prefix for each in asked for value in each.values])) > MAX_PREFIXES:
        problems.append(f"query: expected at most {MAX_PREFIXES} values that end in '*', got {count}")
    if problems:
        raise QueryError("\n".join(problems))
    return Query(conditions=asked, since=since, until=until)


def is_unicode(text: str) -> bool:
    """Return whether a text is one: an argument of a command may have bytes that aren't, as surrogates (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _ProblemError(Exception):
    """What is wrong with a condition."""


class _Character(NamedTuple):
    character: str
    is_quoted: bool


class _Word(NamedTuple):
    """A condition as written: its characters without the quotes, and where it begins, from 1."""

    column: int
    characters: tuple[_Character, ...]
    is_closed: bool
    """Whether its last quote has its counterpart."""


class _Time(NamedTuple):
    is_since: bool
    at: float


_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_LISTS = {Field.SOURCE, Field.TYPE, Field.ROUTE, Field.DESTINATION, Field.STATUS, Field.ID}
_WITH_PREFIX = {Field.SOURCE, Field.TYPE, Field.KEY, Field.BODY, Field.TEXT}
_TIMES = ("since", "until")
_NAMES = (*[field.value for field in Field if field not in (Field.BODY, Field.TEXT)], "body.PATH", *_TIMES)
_TIME = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?(?:Z|[+-]\d\d:\d\d)?)?", re.ASCII)


def _words(text: str) -> Iterator[_Word]:
    """Split a query at blanks outside of quotes."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        begin, characters, is_quoted = at, list[_Character](), False
        while at < len(text) and (is_quoted or not text[at].isspace()):
            if text[at] == '"':
                is_quoted = not is_quoted
            elif is_quoted and text[at] == "\\" and text[at + 1 : at + 2] in ('"', "\\"):
                at += 1
                characters.append(_Character(text[at], is_quoted=True))
            else:
                characters.append(_Character(text[at], is_quoted))
            at += 1
        yield _Word(begin + 1, tuple(characters), not is_quoted)


def _part(word: _Word, now: float) -> list[Condition] | _Time:
    if not word.is_closed:
        raise _ProblemError("expected a closing quote, got none")
    characters = word.characters
    is_negated = len(characters) > 1 and characters[0] == ("-", False)
    if is_negated:
        characters = characters[1:]
    name, value = _split(characters)
    if name is None:
        return [
            Condition(field=Field.TEXT, values=(each,), is_negated=is_negated)
            for each in _text_values(value, is_negated=is_negated)
        ]
    if name in _TIMES:
        if is_negated:
            raise _ProblemError(f"expected '{name}' without '-', got '-{name}'")
        return _Time(name == "since", _time(_text(value), now))
    field = Field.BODY if name.startswith("body.") and len(name) > len("body.") else _field(name)
    alternatives = _alternatives(value) if field in _LISTS else [value]
    values = tuple([_value(field, name, each) for each in alternatives])
    return [Condition(field=field, values=values, path=name if field is Field.BODY else "", is_negated=is_negated)]


def _split(characters: tuple[_Character, ...]) -> tuple[str | None, tuple[_Character, ...]]:
    """Return the field's name, None for text, and the value."""
    for index, each in enumerate(characters):
        if each != (":", False):
            continue
        name, value = _text(characters[:index]), characters[index + 1 :]
        is_name = bool(_NAME.fullmatch(name)) and not any(each.is_quoted for each in characters[:index])
        is_path = name.startswith("body.")  # whose keys may have any characters, in quotes
        is_address = _text(value[:2]) == "//"
        return (name, value) if (is_name or is_path) and not is_address else (None, characters)
    return None, characters


def _field(name: str) -> Field:
    if name in (Field.BODY, Field.TEXT) or name not in list(Field):
        suggestion = did_you_mean(name, [each for each in _NAMES if each != "body.PATH"])
        hint = "" if suggestion else "; text with a colon needs quotes"
        raise _ProblemError(f"expected one of {', '.join(_NAMES)}, got {shown(name)}{suggestion}{hint}")
    return Field(name)


def _alternatives(value: tuple[_Character, ...]) -> list[tuple[_Character, ...]]:
    alternatives: list[list[_Character]] = [[]]
    for each in value:
        if each == (",", False):
            alternatives.append([])
        else:
            alternatives[-1].append(each)
    return [tuple(each) for each in alternatives]


def _value(field: Field, name: str, characters: tuple[_Character, ...]) -> Value:
    value = _prefix(characters)
    if value.is_prefix and field not in _WITH_PREFIX:
        raise _ProblemError(f"{name}: expected a value without '*', got {shown(_text(characters))}")
    if not value.text and not value.is_prefix and field is not Field.BODY:
        raise _ProblemError(f"{name}: expected a value, got none")
    if field is Field.STATUS and value.text not in list(Status):
        suggestion = did_you_mean(value.text, list(Status))
        raise _ProblemError(f"status: expected one of {', '.join(Status)}, got {shown(value.text)}{suggestion}")
    return value


def _text_values(characters: tuple[_Character, ...], *, is_negated: bool) -> list[Value]:
    value = _prefix(characters)
    words = [word.strip(PUNCTUATION) for word in value.text.split()]
    if value.is_prefix and words and not value.text[-1].isspace():  # what may go on keeps its end
        words[-1] = value.text.split()[-1].lstrip(PUNCTUATION)
    found = [Value(word, value.is_prefix and index == len(words) - 1) for index, word in enumerate(words) if word]
    if not found:
        raise _ProblemError(f"expected text with a letter or digit, got {shown(_text(characters))}")
    if is_negated and len(found) > 1:
        raise _ProblemError(f"expected one word after '-', got {len(found)}")
    return found


def _prefix(characters: tuple[_Character, ...]) -> Value:
    is_prefix = bool(characters) and characters[-1] == ("*", False)
    kept = characters[:-1] if is_prefix else characters
    if ("*", False) in kept:
        raise _ProblemError(f"expected '*' at the end alone, got {shown(_text(characters))}; in quotes it is text")
    text = _text(kept)
    if is_prefix and len(text.casefold()) > MAX_TEXT:
        raise _ProblemError(f"expected at most {MAX_TEXT} characters before '*', got {len(text)}")
    return Value(text, is_prefix)


def _time(text: str, now: float) -> float:
    try:
        return now - parse_duration(text)
    except ValueError:
        pass
    if _TIME.fullmatch(text):
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            pass
        else:
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    raise _ProblemError(f"expected a duration as 2h, or a time as 2026-11-30T20:00Z, got {shown(text)}")


def _text(characters: tuple[_Character, ...]) -> str:
    return "".join([each.character for each in characters])
