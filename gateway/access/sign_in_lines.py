"""The lines of the access file that say where people sign in, and by whom. Pure.

    sign-in https://gateway.example.com  key=${file:session-key}
    oidc    https://id.example.com  client=gateway  secret=${file:oidc-secret}  scope=groups  name=email  groups=groups

`sign-in` has the address at which people see the console: by it a browser is told whether a cookie needs TLS, and the
identity provider where to send people back. `key` seals the sessions, for several processes behind that address;
without one, each process makes its own when it starts. `oidc` is the identity provider: its issuer, what it knows the
gateway by, what it is asked for besides `openid` (`email`, unless scopes are named), the claim that names a person, and
the one that has their groups: a text, or a list of texts.

Secrets aren't in the file: `${file:PATH}` (from the file's folder) or `${NAME}`, of the environment.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field

from yarl import URL

from gateway.access.local_request import is_loopback_name
from gateway.model import immutable

EMAIL = "email"
MIN_KEY = 32
"""Characters of a key: as many hexadecimal digits are 128 bits."""
MAX_SCOPES = 20
MAX_TEXT = 254
_REFERENCE = re.compile(r"\$\{(?:file:([^{}]+)|([A-Za-z_][A-Za-z0-9_]*))\}")
_SCOPE = re.compile(r"[!#-\[\]-~]+")
"""RFC 6749, section 3.3."""


@immutable
class SignInAddress:
    """Where people sign in: an origin, such as `https://gateway.example.com`. `key` is a reference until it is read."""

    origin: str
    key: str = field(default="", repr=False)
    line: int = field(default=0, compare=False)

    @property
    def is_secure(self) -> bool:
        return self.origin.startswith("https:")


@immutable
class Oidc:
    """An identity provider (OpenID Connect). `secret` is a reference until it is read."""

    issuer: str
    client: str
    secret: str = field(repr=False)
    scopes: tuple[str, ...] = (EMAIL,)
    name: str = EMAIL
    groups: str | None = None
    line: int = field(default=0, compare=False)

    @property
    def host(self) -> str:
        """What people know it by."""
        return URL(self.issuer).host or self.issuer


def sign_in_of(words: Sequence[str], options: Mapping[str, list[str]], line: int) -> SignInAddress:
    """Return what a line says after `sign-in`. Raises ValueError."""
    origin = words[0] if words else ""
    if not _is_origin(origin):
        expected = "an https address without a path, such as https://gateway.example.com, or http of a loopback one"
        raise ValueError(f"expected {expected}")
    return SignInAddress(origin=origin.lower(), key=_reference("key", options["key"]) or "", line=line)


def oidc_of(words: Sequence[str], options: Mapping[str, list[str]], line: int) -> Oidc:
    """Return what a line says after `oidc`. Raises ValueError."""
    issuer = words[0] if words else ""
    if not is_https(issuer) or "?" in issuer or "#" in issuer:
        raise ValueError("expected the issuer, an https address without a query")
    secret = _reference("secret", options["secret"])
    if secret is None:
        raise ValueError("expected secret=${file:PATH} or secret=${NAME} once, got none")
    scopes = tuple(dict.fromkeys([each for each in options["scope"] if each != "openid"]))
    if len(scopes) > MAX_SCOPES or any(not _SCOPE.fullmatch(each) for each in scopes):
        raise ValueError(f"expected at most {MAX_SCOPES} scopes without spaces and quotes")
    return Oidc(
        issuer=issuer,
        client=_one("client", options["client"]),
        secret=secret,
        scopes=scopes or (EMAIL,),
        name=_one("name", options["name"]) if options["name"] else EMAIL,
        groups=_one("groups", options["groups"]) if options["groups"] else None,
        line=line,
    )


def problems_between(
    sign_ins: Sequence[SignInAddress], providers: Sequence[Oidc], first_group: int | None
) -> Iterator[tuple[int, str]]:
    """Yield what doesn't go together, with the number of the line to change; `first_group` is that of a group."""
    for kind, lines in (("sign-in", [each.line for each in sign_ins]), ("oidc", [each.line for each in providers])):
        yield from [(line, f"expected only one line {kind}") for line in lines[1:]]
    if providers and not sign_ins:
        yield providers[0].line, "expected a line sign-in with the address that people come back to, got none"
    if first_group is not None and (not providers or providers[0].groups is None):
        yield first_group, "expected a line oidc with groups=…, the claim that has them, got none"


def filled_in(text: str, file_of: Callable[[str], str], environ: Mapping[str, str]) -> str:
    """Return the value of a reference. `file_of` reads a file and raises ValueError, as this does."""
    found = _REFERENCE.fullmatch(text)
    assert found is not None
    if found[1] is not None:
        return file_of(found[1])
    if not (value := environ.get(found[2], "")):
        raise ValueError(f"expected the environment variable {found[2]}, got none")
    return value


def path_in(text: str) -> str | None:
    """Return the path that a reference names, None if it names a variable."""
    found = _REFERENCE.fullmatch(text)
    return None if found is None else found[1]


def checked_key(value: str) -> str:
    """Return the value of a key. Raises ValueError."""
    if len(value) < MIN_KEY:
        raise ValueError(f"expected at least {MIN_KEY} characters, got {len(value)}")
    return value


def checked_secret(value: str) -> str:
    """Return the value of a client's secret. Raises ValueError."""
    if not value or not value.isprintable() or not value.isascii():
        raise ValueError("expected printable characters of ASCII")
    return value


def is_https(address: str) -> bool:
    """Return whether a text is an https address, without a user, of visible ASCII."""
    if not re.fullmatch(r"https://[!-~]+", address) or len(address) > MAX_TEXT * 4 or "\\" in address:
        return False
    try:
        found = URL(address)
    except ValueError:
        return False
    return bool(found.host) and found.user is None and found.password is None


def _is_origin(text: str) -> bool:
    try:
        found = URL(text)
        is_origin = found.is_absolute() and str(found.origin()) == text.lower()
    except ValueError:
        return False
    return is_origin and (found.scheme == "https" or (found.scheme == "http" and is_loopback_name(found.host or "")))


def _reference(name: str, values: list[str]) -> str | None:
    if not values:
        return None
    if len(values) > 1 or not _REFERENCE.fullmatch(values[0]):  # not repeated: it may be the secret itself
        raise ValueError(f"expected {name}=${{file:PATH}} or {name}=${{NAME}} once")
    return values[0]


def _one(name: str, values: list[str]) -> str:
    if len(values) != 1 or not 0 < len(values[0]) <= MAX_TEXT or not values[0].isprintable():
        raise ValueError(f"expected {name}= and at most {MAX_TEXT} printable characters once")
    return values[0]
