"""The file that says who may ask, and in which role: a token or a person on each line. Pure.

    # for the deploy job
    token  deploys            operator  sha256=9f86d081884c7d65…  source=github  expires=2027-03-01T00:00:00Z
    person ada@example.com    operator
    person *@example.com      viewer    owner=payments  owner='team b'

`gateway token` writes the tokens; people are written by hand. Words are divided and quoted as in a shell, and `#`
begins a comment. Several `source` or `owner` are a choice; of both kinds, both have to hold. A person is who a trusted
proxy says that they are; of several lines that fit, the one without `*` counts, else the first.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from gateway.access.principal import AccessRole
from gateway.model import NAME_PATTERN, UsageError, immutable

MAX_ENTRIES = 1000
"""Each request with a token is compared with all of them."""
MAX_BYTES = 1 << 20
MAX_NAME = 254
"""Characters of a person's name: of an address (RFC 5321)."""
_OPTIONS = {"token": ("sha256", "source", "owner", "expires"), "person": ("source", "owner")}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")


class AccessFileError(UsageError):
    """The access file is at fault. `str()` has one problem per line, each with its line's number."""


@immutable
class Grant:
    """What a token or a person may: `digest` and `expires` (Unix seconds; None for never) are a token's."""

    name: str
    role: AccessRole
    sources: frozenset[str] | None = None
    owners: frozenset[str] | None = None
    digest: bytes = b""
    expires: float | None = None

    @property
    def is_token(self) -> bool:
        return bool(self.digest)


@immutable
class AccessList:
    """Who may ask, as a file says."""

    tokens: tuple[Grant, ...] = ()
    people: tuple[Grant, ...] = ()

    def person(self, name: str) -> Grant | None:
        """Return what a person may; None if they aren't in the list. Case doesn't matter."""
        folded = name.casefold()
        exact = next((each for each in self.people if each.name.casefold() == folded), None)
        return exact or next((each for each in self.people if _fits(each.name.casefold(), folded)), None)


def read_access(text: str, file: str) -> AccessList:
    """Return what a file says. Raises AccessFileError with all problems."""
    tokens, people, problems = list[Grant](), list[Grant](), list[str]()
    names = set[tuple[bool, str]]()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            grant = _grant(line)
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
            continue
        if grant is None:
            continue
        if (key := (grant.is_token, grant.name.casefold())) in names:
            problems.append(f"{file}:{number}: expected each name once, got {grant.name!r} again")
        names.add(key)
        (tokens if grant.is_token else people).append(grant)
    if len(names) > MAX_ENTRIES:
        problems.append(f"{file}: expected at most {MAX_ENTRIES:,} tokens and people, got {len(names):,}")
    if problems:
        raise AccessFileError("\n".join(problems))
    return AccessList(tokens=tuple(tokens), people=tuple(people))


def with_token(text: str, grant: Grant) -> str:
    """Return the text of a file with another token."""
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}{_line(grant)}\n"


def without_token(text: str, name: str) -> str:
    """Return the text of a file without a token; the rest stays as it is written."""
    lines = text.splitlines(keepends=True)
    return "".join([line for line in lines if not _is_token(line, name)])


def _is_token(line: str, name: str) -> bool:
    grant = _grant(line)
    return grant is not None and grant.is_token and grant.name == name


def _grant(line: str) -> Grant | None:
    """Return what a line says, None for one that says nothing. Raises ValueError, without the words of the line."""
    try:
        kind, *words = shlex.split(line, comments=True) or [""]
    except ValueError:
        raise ValueError("expected words as in a shell, got a quote without an end") from None
    if not kind:
        return None
    if kind not in _OPTIONS:
        raise ValueError("expected a line that begins with token or person, got another word")
    if len(words) < 2:  # noqa: PLR2004 - a name and a role
        raise ValueError(f"expected {kind} NAME ROLE, got fewer words")
    name, role, *options = words
    if kind == "token" and not NAME_PATTERN.fullmatch(name):
        raise ValueError("expected a name of at most 63 lower-case letters, digits, '.', '_' and '-', got another")
    if kind == "person" and (not 0 < len(name) <= MAX_NAME or not name.isprintable()):
        raise ValueError(f"expected a name of at most {MAX_NAME} printable characters, got another")
    if role not in set(AccessRole):
        raise ValueError(f"expected a role: {', '.join(AccessRole)}, got another word")
    values = _options(kind, options)
    return Grant(
        name=name,
        role=AccessRole(role),
        sources=_limit(values["source"]),
        owners=_limit(values["owner"]),
        digest=_digest(values["sha256"]) if kind == "token" else b"",
        expires=_expires(values["expires"]) if kind == "token" else None,
    )


def _options(kind: str, words: Iterable[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {name: [] for name in _OPTIONS[kind]}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not value or name not in values:
            raise ValueError(f"expected {', '.join(f'{each}=…' for each in values)} after the role, got another word")
        values[name].append(value)
    return values


def _limit(values: list[str]) -> frozenset[str] | None:
    return frozenset(values) if values else None


def _digest(values: list[str]) -> bytes:
    if len(values) != 1 or not _DIGEST.fullmatch(values[0]):
        raise ValueError(
            "expected sha256= and 64 hexadecimal digits once, as `gateway token new` writes it, got another"
        )
    return bytes.fromhex(values[0])


def _expires(values: list[str]) -> float | None:
    if not values:
        return None
    problem = "expected expires= and a time such as 2027-03-01T00:00:00Z, got another"
    if len(values) > 1 or not _TIME.fullmatch(values[0]):
        raise ValueError(problem)
    try:
        return datetime.fromisoformat(values[0]).timestamp()
    except ValueError:
        raise ValueError(problem) from None


def _line(grant: Grant) -> str:
    return " ".join(map(shlex.quote, _words(grant)))


def _words(grant: Grant) -> Iterator[str]:
    yield from ("token", grant.name, grant.role, f"sha256={grant.digest.hex()}")
    for name, values in (("source", grant.sources), ("owner", grant.owners)):
        yield from [f"{name}={value}" for value in sorted(values or ())]
    if grant.expires is not None:
        yield f"expires={datetime.fromtimestamp(grant.expires, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _fits(pattern: str, name: str) -> bool:
    """Return whether a pattern such as `*@example.com` fits: with one `*`, that stands for anything."""
    before, star, after = pattern.partition("*")
    return bool(star) and len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
