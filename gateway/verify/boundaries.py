"""Where each part of a signed string ends: a string that is that of two requests vouches for both of them.

A signature covers a string, and a request is what that is read back as. Of `{header:X-Time}{body}`, whoever has seen
one request can move bytes of the body into the header, and the signature stays good. So a signed string has to be
readable in one way alone. One part of it may be anything: the body or the form, else the last part. Those before it
are read from the string's beginning, and those after it from its end, each by its format (Unix seconds have ten
digits), or by what stands between it and its neighbour, which it mustn't have in itself. `{secret}` stands for such a
mark, too: nobody else knows it.

Two kinds of strings can't be read so, because their vendors define them: the names and values of `{form}`, also after
the query of a `{url}`, as Twilio and Mandrill sign them; and neighbours of the format `any`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.model import RefusedError
from gateway.verify.content import FieldPath
from gateway.verify.request import Reason, Request, refused
from gateway.verify.timestamps import FORMATS

ANY = "any"
"""The format of a part that is read as what remains between those before and after it."""
MAX_LENGTH = 999
_QUERY = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*")  # RFC 3986, section 3.4
_OF_QUERIES = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')  # of JSON
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_GIVEN = re.compile(rb"[!-z~]+")


class Part(NamedTuple):
    """A part of the signed string. `name` is that of a header (in lower case), a parameter, a digest or a field.

    `path` is a field's; of an element it is what that begins with.
    `format` is one of timestamps.FORMATS, ANY, or its length in bytes; empty if none is stated.
    """

    kind: str
    name: bytes = b""
    path: FieldPath = ()
    is_optional: bool = False
    format: str = ""

    @property
    def shown(self) -> str:
        """The part as it is written in a template."""
        beside = map(str, self.path) if self.kind == "element" else ()
        words = [self.kind.replace("form_field", "form"), self.name.decode(), *beside]
        return "{" + ":".join(filter(None, words)) + ("?" if self.is_optional else "") + "}"


class AmbiguousError(ValueError):
    """A template's strings can be read in several ways; its text says where, and what would help."""


def is_format(text: str) -> bool:
    """Return whether a part's format may be written so."""
    return text in FORMATS or text == ANY or (text.isdecimal() and text.isascii() and 0 < int(text) <= MAX_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What the part at `index` has to be for the string to be unambiguous.

    It has a format; or it ends where first `follows` or `mark` is; or it begins after the last `mark`; or it is an
    address beside the body.
    """

    part: Part
    index: int
    format: re.Pattern[bytes] | None = None
    follows: re.Pattern[bytes] | None = None
    mark: bytes = b""
    is_before_body: bool = False
    is_after_free: bool = False

    def check(self, pieces: Sequence[bytes], whole: bytes, request: Request, url: str) -> None:
        """Raise RefusedError unless the part is so. `pieces` make up the `whole` string; `url` is the source's."""
        piece = pieces[self.index]
        if self.format is not None:
            if not self.format.fullmatch(piece):
                raise self._refusal(f"of the format {self.part.format}")
        elif self.is_before_body:
            self._check_before_body(request)
        elif self.is_after_free:
            if self.part.kind == "url":
                if url in request.query:
                    raise self._refusal("without itself in its query")
            elif (self.mark + piece).rfind(self.mark):
                raise self._refusal(f"without {self.mark.decode()!r} in it")
        else:
            self._check_end(pieces, whole, request)

    def _check_before_body(self, request: Request) -> None:
        """A query ends where no character of a query is: so the body must begin with another one."""
        if not _QUERY.fullmatch(request.query):
            raise self._refusal("with a query of a URL's characters alone")
        begin = request.body[:1]
        if _OF_QUERIES.match(begin) if request.query else begin == b"?":
            raise refused(
                Reason.UNREADABLE_BODY,
                "expected a body that can't be taken for more of the address's signed query, got something else",
            )

    def _check_end(self, pieces: Sequence[bytes], whole: bytes, request: Request) -> None:
        piece = pieces[self.index]
        begin = sum(map(len, pieces[: self.index]))
        end = begin + len(piece)
        if self.part.kind == "url":  # whose beginning is the source's
            begin = begin + piece.find(b"?") if request.query else end
        if self.follows is None:
            if whole.find(self.mark, begin) != end:
                raise self._refusal(f"without {self.mark.decode()!r} in it")
        else:
            found = self.follows.search(whole, begin)
            if found is None or found.start() != end:
                raise self._refusal("without anything like what follows it")

    def _refusal(self, what: str) -> RefusedError:
        reason = Reason.MALFORMED_TIMESTAMP if self.part.format in FORMATS else Reason.MALFORMED_SIGNATURE
        return refused(reason, f"expected {self.part.shown}, which is signed, {what}, got something else")


def guards(parts: Sequence[bytes | Part], unit: str | None) -> tuple[Guard, ...]:
    """Return what the parts of a string have to be; `unit` is that of its timestamp. Raises AmbiguousError."""
    found: list[Guard] = []
    begin = 0
    walls = [index for index, part in enumerate(parts) if isinstance(part, Part) and part.kind == "secret"]
    for end in (*walls, len(parts)):
        found += _segment(parts, begin, end, unit)
        begin = end + 1
    return tuple(found)


def _segment(parts: Sequence[bytes | Part], begin: int, end: int, unit: str | None) -> list[Guard]:
    """Return the guards of the parts from `begin` to `end`, which are read by themselves.

    `{timestamp}.{header:X-Id}.{body}|{query:n}` is read so: the body is *free*, since it may be anything. What is in
    front of it is read from the beginning. The timestamp *ends by itself*, after ten digits, so it needs no guard.
    X-Id ends at the first `.`, its *mark*, so it mustn't have one (`_before`). What is after the body is read from the
    end: n begins after the last `|`, so it mustn't have one, while the body may (`_after`).
    """
    named = [(index, part) for index, part in enumerate(parts[:end]) if index >= begin and isinstance(part, Part)]
    free = [(index, part) for index, part in named if _is_free(part)]
    if len(free) > 1:
        if all(part.format == ANY for _, part in named):
            return []  # neighbours of which it is stated that nothing depends on where one of them ends
        raise AmbiguousError(
            f"expected one part that may be anything, got {free[0][1].shown} and {free[1][1].shown}: "
            "nothing tells where one of them ends"
        )
    at = free[0][0] if free else _last_text(parts, named, end, unit)
    found: list[Guard] = []
    for index, part in named:
        if part.format and part.format != ANY:
            found.append(Guard(part=part, index=index, format=_pattern(part, unit)))
        elif index < at and not _ends_by_itself(part, unit):
            found += _before(parts, index, end, unit)
        elif index > at and not _begins_by_itself(part, unit):
            found.append(_after(parts, index, at))
    return found


def _before(parts: Sequence[bytes | Part], index: int, end: int, unit: str | None) -> list[Guard]:
    """Return the guard of a part that is read from the beginning: its end is where first is what follows it.

    In `{header:X-Id}.{body}` that is a mark, `.`. In `{header:X-Id}.{timestamp}{body}` it is all up to the body: X-Id
    ends where a dot and ten digits *follow*, and may have a dot without them, as `a.b` has.
    """
    part = parts[index]
    assert isinstance(part, Part)
    following: list[bytes] = []
    for each in parts[index + 1 : end]:
        pattern = _pattern(each, unit) if isinstance(each, Part) else re.compile(re.escape(each))
        if pattern is None:
            break
        following.append(b"(?:" + pattern.pattern + b")")
    after = parts[index + 1] if index + 1 < end else None
    if following and not (isinstance(after, Part) and _is_of_digits(after, unit)):
        if isinstance(after, bytes) and len(following) == 1:
            return [Guard(part=part, index=index, mark=after)]
        return [Guard(part=part, index=index, follows=re.compile(b"".join(following), re.DOTALL))]
    if part.kind in {"url", "path"} and isinstance(after, Part):
        if after.kind == "body" and not after.name:
            return [Guard(part=part, index=index, is_before_body=True)]
        if after.kind == "form" and part.kind == "url":
            return []
    raise _ambiguous(part, after)


def _after(parts: Sequence[bytes | Part], index: int, at: int) -> Guard:
    """Return the guard of a part that is read from the end: it begins after the last of what stands before it.

    In `{body}|{query:n}` that is a mark, `|`. `at` is the index of what is free, here of the body: in `{body}{url}` the
    address begins with the source's own, which nobody else chooses, and mustn't be in its query again.
    """
    part, before = parts[index], parts[index - 1]
    assert isinstance(part, Part)
    if isinstance(before, bytes):
        return Guard(part=part, index=index, mark=before, is_after_free=True)
    if part.kind == "url" and index - 1 == at:
        return Guard(part=part, index=index, is_after_free=True)
    raise _ambiguous(before, part)


def _ambiguous(part: Part, after: bytes | Part | None) -> AmbiguousError:
    neighbour = after.shown if isinstance(after, Part) else "what follows"
    texts = [each for each in (part, after) if isinstance(each, Part) and each.kind in {"header", "query", "field"}]
    help_ = f", or a format as in {texts[0].shown[:-1]}:s}}" if texts else ""
    return AmbiguousError(
        f"expected a character between {part.shown} and {neighbour}{help_}, got neither: bytes could be moved from "
        "one to the other"
    )


def _last_text(parts: Sequence[bytes | Part], named: Sequence[tuple[int, Part]], end: int, unit: str | None) -> int:
    """Return the index of the last part whose format isn't known, which may be anything; the end if there is none."""
    texts = [index for index, part in named if not _ends_by_itself(part, unit)]
    if not texts:
        return end
    rest = [part for part in parts[texts[-1] + 1 : end] if isinstance(part, Part)]
    return texts[-1] if all(_begins_by_itself(part, unit) for part in rest) else end


def _is_free(part: Part) -> bool:
    return part.format == ANY or part.kind == "form" or (part.kind == "body" and not part.name)


def _ends_by_itself(part: Part, unit: str | None) -> bool:
    """Return whether the end of a part is known from its beginning: a source has one path, and one method."""
    return _is_given(part) or _pattern(part, unit) is not None


def _begins_by_itself(part: Part, unit: str | None) -> bool:
    """Return whether the beginning of a part is known from its end."""
    pattern = _pattern(part, unit)
    return _is_given(part) or (pattern is not None and pattern is not _STRING)


def _is_given(part: Part) -> bool:
    return part.kind in {"method", "given"} or (part.kind == "path" and not part.name)


def _is_of_digits(part: Part, unit: str | None) -> bool:
    """Return whether a part can be taken for an end of what stands before it, if that ends in digits, too."""
    format_ = unit if part.kind == "timestamp" else part.format
    return format_ not in {"iso", "date"} and _pattern(part, unit) is not _STRING


def _pattern(part: Part, unit: str | None) -> re.Pattern[bytes] | None:
    """Return what a part is, if its end is known from its beginning; None if it isn't, or the rules have it."""
    if part.kind == "timestamp":
        return FORMATS[unit or "s"]
    if part.format and part.format != ANY:
        return FORMATS.get(part.format) or re.compile(b".{%d}" % int(part.format), re.DOTALL)
    if part.kind in {"body", "url"} and part.name == b"sha256":
        return _DIGEST
    if part.kind == "element" or (part.kind == "body" and part.name == b"json"):
        return _STRING
    return _GIVEN if part.kind == "given" else None
