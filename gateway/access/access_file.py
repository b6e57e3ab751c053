"""The file that says who may ask, and in which role: a token, a person or a group on each line. Pure.

    # for the deploy job
    token  deploys            operator  sha256=9f86d081884c7d65…  source=github  expires=2027-03-01T00:00:00Z
    person ada@example.com    operator
    group  support            reader    owner=payments
    person *@example.com      viewer    owner=payments  owner='team b'

    sign-in https://gateway.example.com
    oidc    https://id.example.com  client=gateway  secret=${file:oidc-secret}  groups=groups

`gateway token` writes the tokens; the rest is written by hand. Words are divided and quoted as in a shell, and `#`
begins a comment. Several values of one option are alternatives (OR); `source` and `owner` together must both match
(AND). A trusted proxy, or the identity provider of `oidc`, says who a person is; the latter also says their groups. If
several lines match a person, the one with the whole name counts, else the first. `sign_in_lines.py` has the last two
kinds.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import field
from datetime import UTC, datetime
from string import ascii_lowercase, ascii_uppercase

from gateway.access.principal import AccessRole
from gateway.access.sign_in_lines import Oidc, SignInAddress, oidc_of, problems_between, sign_in_of
from gateway.model import NAME_PATTERN, UsageError, immutable

MAX_ENTRIES = 1000
"""Each request with a token is compared with all of them."""
MAX_BYTES = 1 << 20
MAX_NAME = 254
"""Characters of a person's name: of an address (RFC 5321)."""
_GRANTED = ("token", "person", "group")
_OPTIONS = {
    "token": ("sha256", "source", "owner", "expires"),
    "person": ("source", "owner"),
    "group": ("source", "owner"),
    "sign-in": ("key",),
    "oidc": ("client", "secret", "scope", "name", "groups"),
}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_TO_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


class AccessFileError(UsageError):
    """The access file is at fault. `str()` has one problem per line, each with its line's number."""


@immutable
class Grant:
    """What a token, a person or a group may: `digest` and `expires` (Unix seconds; None for never) are a token's.

    `line` is its number in the file.
    """

    name: str
    role: AccessRole
    sources: frozenset[str] | None = None
    owners: frozenset[str] | None = None
    digest: bytes = b""
    expires: float | None = None
    is_group: bool = False
    line: int = field(default=0, compare=False)

    @property
    def is_token(self) -> bool:
        return bool(self.digest)


@immutable
class AccessList:
    """Who may ask, as a file says, and where and by whom people sign in."""

    tokens: tuple[Grant, ...] = ()
    people: tuple[Grant, ...] = ()
    groups: tuple[Grant, ...] = ()
    sign_in: SignInAddress | None = None
    oidc: Oidc | None = None

    def person(self, name: str, groups: Collection[str] = ()) -> Grant | None:
        """Return what a person of these groups may; None if no line fits them. The case of A to Z doesn't matter."""
        folded = _folded(name)
        exact = next((each for each in self.people if _folded(each.name) == folded), None)
        if exact is not None:
            return exact
        fitting = [each for each in self.people if _fits(_folded(each.name), folded)]
        fitting += [each for each in self.groups if each.name in groups]
        return min(fitting, key=lambda each: each.line, default=None)

    def known_groups(self, groups: Collection[str]) -> tuple[str, ...]:
        """Return those of some groups that have a line, in the file's order."""
        return tuple([each.name for each in self.groups if each.name in groups])


def read_access(text: str, file: str) -> AccessList:
    """Return what a file says. Raises AccessFileError with all problems."""
    problems = list[str]()
    granted: dict[str, list[Grant]] = {kind: [] for kind in _GRANTED}
    sign_ins, providers = list[SignInAddress](), list[Oidc]()
    names = set[tuple[str, str]]()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            kind, words = _words_of(line)
            if not kind:
                continue
            if kind == "sign-in":
                sign_ins.append(sign_in_of(words, _options(kind, words[1:], "the address"), number))
            elif kind == "oidc":
                providers.append(oidc_of(words, _options(kind, words[1:], "the issuer"), number))
            else:
                granted[kind].append(_grant(kind, words, number))
        except ValueError as error:
            problems.append(f"{file}:{number}: {error}")
            continue
        name = words[0] if kind == "group" else _folded(words[0])
        if kind in _GRANTED and (key := (kind, name)) in names:
            problems.append(f"{file}:{number}: expected each name once, got {words[0]!r} again")
        elif kind in _GRANTED:
            names.add(key)
    if len(names) > MAX_ENTRIES:
        problems.append(f"{file}: expected at most {MAX_ENTRIES:,} tokens and people, got {len(names):,}")
    first_group = granted["group"][0].line if granted["group"] else None
    problems += [f"{file}:{line}: {each}" for line, each in problems_between(sign_ins, providers, first_group)]
    if problems:
        raise AccessFileError("\n".join(problems))
    return AccessList(
        tokens=tuple(granted["token"]),
        people=tuple(granted["person"]),
        groups=tuple(granted["group"]),
        sign_in=sign_ins[0] if sign_ins else None,
        oidc=providers[0] if providers else None,
    )


def with_token(text: str, grant: Grant) -> str:
    """Return the text of a file with another token."""
    end = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{end}{_line(grant)}\n"


def without_token(text: str, name: str) -> str:
    """Return the text of a file without a token; the rest stays as it is written."""
    lines = text.splitlines(keepends=True)
    return "".join([line for line in lines if not _is_token(line, name)])


def _is_token(line: str, name: str) -> bool:
    kind, words = _words_of(line)
    return kind == "token" and words[0] == name


def _words_of(line: str) -> tuple[str, list[str]]:
    """Return a line's kind ("" if it says nothing) and its words. Raises ValueError, without the words of the line."""
    try:
        kind, *words = shlex.split(line, comments=True) or [""]
    except ValueError:
        raise ValueError("expected words as in a shell, got a quote without an end") from None
    if kind and kind not in _OPTIONS:
        raise ValueError("unknown kind of line; expected token, person, group, sign-in or oidc")
    if kind in _GRANTED and len(words) < 2:  # noqa: PLR2004 - a name and a role
        raise ValueError(f"expected {kind} NAME ROLE")
    return kind, words


def _grant(kind: str, words: list[str], line: int) -> Grant:
    name, role, *options = words
    if kind == "token" and not NAME_PATTERN.fullmatch(name):
        raise ValueError("expected a name of at most 63 lower-case letters, digits, '.', '_' and '-'")
    if kind != "token" and (not 0 < len(name) <= MAX_NAME or not name.isprintable()):
        raise ValueError(f"expected a name of at most {MAX_NAME} printable characters")
    if role not in set(AccessRole):
        raise ValueError(f"unknown role; expected one of {', '.join(AccessRole)}")
    values = _options(kind, options, "the role")
    return Grant(
        name=name,
        role=AccessRole(role),
        sources=_limit(values["source"]),
        owners=_limit(values["owner"]),
        digest=_digest(values["sha256"]) if kind == "token" else b"",
        expires=_expires(values["expires"]) if kind == "token" else None,
        is_group=kind == "group",
        line=line,
    )


def _options(kind: str, words: Iterable[str], after: str) -> Mapping[str, list[str]]:
    values: dict[str, list[str]] = {name: [] for name in _OPTIONS[kind]}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not value or name not in values:
            raise ValueError(f"expected {', '.join(f'{each}=…' for each in values)} after {after}")
        values[name].append(value)
    return values


def _limit(values: list[str]) -> frozenset[str] | None:
    return frozenset(values) if values else None


def _digest(values: list[str]) -> bytes:
    if len(values) != 1 or not _DIGEST.fullmatch(values[0]):
        raise ValueError("expected sha256= and 64 hexadecimal digits once, as `gateway token new` writes it")
    return bytes.fromhex(values[0])


def _expires(values: list[str]) -> float | None:
    if not values:
        return None
    problem = "expected expires= and a time such as 2027-03-01T00:00:00Z"
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


def _folded(name: str) -> str:
    """Return a name as it is compared, without ASCII case only: full case folding would merge distinct names."""
    return name.translate(_TO_LOWER)


def _fits(pattern: str, name: str) -> bool:
    """Return whether a pattern such as `*@example.com` fits: with one `*`, that stands for anything."""
    before, star, after = pattern.partition("*")
    return bool(star) and len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
