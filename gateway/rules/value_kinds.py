"""The kinds of values in routes.yaml: what they accept, and how they are parsed.

`schema_reader.py` handles locations, and references such as `${NAME}`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, assert_never

from gateway.model import NAME_PATTERN, STORED_STATUSES
from gateway.rules.addresses import http_url, unresolved_url
from gateway.rules.rules import RESERVED_HEADERS, cgi_normalized, is_opt_in_header
from gateway.rules.templates import Template
from gateway.text import DURATION, UNSENDABLE, parse_duration
from gateway.verify.client_certificates import normal_email, normal_subject
from gateway.verify.encodings import signing_key
from gateway.verify.schemes import WEAK
from gateway.verify.tokens import TOKEN


@dataclass(frozen=True, slots=True)
class Scalar:
    """A scalar. `parse` raises ValueError, with a message if "expected …, got …" isn't enough."""

    expected: str
    parse: Callable[[Any], object]
    json: Mapping[str, object]
    _: KW_ONLY
    choices: tuple[str, ...] = ()
    is_secret: bool = False
    """Never show the value."""
    is_name_ref: bool = False
    """It is the name of something that has to exist. It is returned with its location."""
    unresolved: Callable[[str], object] | None = None
    """Returns a placeholder for a string with unresolved references. If this is None, the key is omitted.

    Raises like `parse` if the string is wrong whatever the references' values, or ExpressionError if there is no
    placeholder.
    """

    @property
    def is_text(self) -> bool:
        return self.json.get("type") == "string"


@dataclass(frozen=True, slots=True)
class Tree:
    """A value of any shape, parsed as a whole. `is_template` keeps `${{ … }}`, `is_raw` also keeps references."""

    expected: str
    shape: type | tuple[type, ...]
    parse: Callable[[Any], object]
    json: Mapping[str, object]
    _: KW_ONLY
    is_template: bool = False
    is_raw: bool = False
    is_secret: bool = False
    """Never show the value, even if its shape is wrong."""
    unresolved: str | None = None
    """Placeholder for a string with unresolved references while checking. None keeps the string unresolved."""


@dataclass(frozen=True, slots=True)
class Several:
    """A list of one kind. `may_be_one` also accepts a single value without brackets."""

    expected: str
    item: "Kind"
    _: KW_ONLY
    may_be_one: bool = False
    may_be_empty: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping with arbitrary keys. Read as a dict."""

    expected: str
    key: Scalar
    value: "Kind"
    _: KW_ONLY
    has_number_keys: bool = False
    """Keys such as `404` needn't be quoted."""


@dataclass(frozen=True, slots=True)
class NameOr:
    """The name of something, a template for the name, or an inline definition."""

    name: Scalar
    record: "MappingKind"
    template: Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of a mapping. `default` is for editors, in the syntax of the file."""

    name: str
    kind: "Kind"
    about: str
    default: object = None
    is_required: bool = False
    names_expressions: bool = False
    """Its expressions are parsed first. Other expressions in the mapping may use them by name."""
    gives: str = ""
    """A variable that this key defines for expressions below keys with `takes_given`."""
    takes_given: bool = False
    """Expressions below it may use the variables that the mapping's keys define (`gives`)."""
    gives_secrets: bool = False
    """Its secrets are read first. Expressions below keys that allow secrets may use them by name."""
    takes_secrets: bool = False
    is_of_tests: bool = False
    """Only `gateway test` reads it, so a mistake in it doesn't make the rules unusable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingKind:
    """A mapping with known keys."""

    name: str
    about: str
    keys: tuple[Key, ...]
    is_choice: bool = False
    """Exactly one of the keys must be present."""
    by_name: Mapping[str, Key] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {key.name: key for key in self.keys})

    @property
    def expected(self) -> str:
        required = " and ".join([f"`{key.name}`" for key in self.keys if key.is_required])
        return f"a mapping with {required}" if required else "a mapping"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByKey:
    """A mapping of one of several kinds. The value of a key decides which; without that key, it is `otherwise`."""

    key: str
    kinds: Mapping[str, MappingKind]
    otherwise: MappingKind


Kind = Scalar | Tree | Several | Table | NameOr | MappingKind | ByKey


def has_secrets(kind: Kind) -> bool:
    """Return whether a value of a kind may contain a secret, and so may a value of the wrong kind in its place."""
    match kind:
        case Scalar() | Tree():
            return kind.is_secret
        case Several():
            return has_secrets(kind.item)
        case Table():
            return has_secrets(kind.value)
        case NameOr():
            return has_secrets(kind.record)
        case MappingKind():
            return any(has_secrets(key.kind) for key in kind.keys)
        case ByKey():
            return any(map(has_secrets, (*kind.kinds.values(), kind.otherwise)))
    assert_never(kind)


_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)/([smh])", re.ASCII)
_DNS_NAME = re.compile(r"[A-Za-z0-9_*-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_EMAIL = re.compile(r"[!-?A-~]+@[A-Za-z0-9.-]+")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+")
_TOPIC = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")  # as Kafka has it
_CREDENTIAL = re.compile(r"[!-~]+")  # visible ASCII: more than RFC 6750 allows, since some tokens contain a `|`
_USER = re.compile(r"[^:\x00-\x1f\x7f\ud800-\udfff]*")  # RFC 7617: a colon ends it
_PASSWORD = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]*")
_SCOPE = re.compile(r"[!#-\[\]-~]+")  # RFC 6749, section 3.3
_STATUS = re.compile(r"[345]\d\d", re.ASCII)
_RESULTS = ("3xx", "4xx", "5xx", "timeout", "connect", "dns", "tls", "transport", "auth", "egress_refused")
_PER = {"s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d{1,6})(B|KiB|MiB)", re.ASCII)
_BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}
_MAPPED = 96  # bits of the prefix ::ffff:0:0/96


def mappings_in(kind: Kind, path: str = "") -> Iterator[tuple[str, MappingKind]]:
    """Yield all mappings with known keys in a kind, with their paths, but not those of presets."""
    match kind:
        case MappingKind():
            yield path, kind
            for key in kind.keys:
                yield from mappings_in(key.kind, f"{path}.{key.name}" if path else key.name)
        case ByKey():
            yield from mappings_in(kind.otherwise, path)
        case NameOr():
            yield from mappings_in(kind.record, path)
        case Several():
            yield from mappings_in(kind.item, f"{path}[]")
        case Table():
            yield from mappings_in(kind.value, f"{path}.NAME")
        case Scalar() | Tree():
            pass


def parse_rate(text: str) -> float:
    """Parse `100/s`, `10/m` or `5/h` to events per second. Raises ValueError."""
    found = _RATE.fullmatch(text)
    if not found or not float(found[1]):
        raise ValueError
    return float(found[1]) / _PER[found[2]]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004 # one exception for "not what is expected"
    return value


def matching(pattern: re.Pattern[str]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not pattern.fullmatch(_text(value)):
            raise ValueError
        return str(value)

    return parse


def _header(value: object) -> str:
    name = matching(TOKEN)(value)
    if cgi_normalized(name) in RESERVED_HEADERS:
        raise ValueError(f"expected a header that the gateway doesn't write itself, got {name!r}")
    return name


def _opt_in_header(value: object) -> str:
    name = _header(value)
    if not is_opt_in_header(name):
        expected = "expected a header that isn't forwarded by default, such as X-Forwarded-For"
        raise ValueError(f"{expected}, got {name!r}")
    return name


def _subject(value: object) -> str:
    text = _text(value)
    try:
        return normal_subject(text)
    except ValueError:
        raise ValueError from None


def _dns_name(value: object) -> str:
    return matching(_DNS_NAME)(value).lower()


def _email(value: object) -> str:
    return normal_email(matching(_EMAIL)(value))


def _header_value(value: object) -> str:
    text = _text(value)
    if UNSENDABLE.search(text):
        raise ValueError("expected a header value without control characters, got one with them")
    return text


def _header_template(value: object) -> Template:
    return Template(_header_value(value))


def _stored_status(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value in STORED_STATUSES:
        return value
    raise ValueError


def _signing_secret(value: object) -> bytes:
    text = _text(value)
    try:
        return signing_key(text)
    except ValueError:
        raise ValueError from None  # binascii's message doesn't help


def _beside_network(text: str) -> str:
    """Return the message for a network with host bits set; "" if the value isn't a network."""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return ""
    address = text.partition("/")[0]
    return f"expected a network without host bits, {network}, or {address} alone, got {text!r}"


def _network(value: object) -> IPv4Network | IPv6Network:
    text = _text(value)
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(_beside_network(text)) from None


def _peer_network(value: object) -> IPv4Network | IPv6Network:
    """Parse a network of peers. IPv4-mapped ones (RFC 4291, section 2.5.5.2) become IPv4, like peers' addresses."""
    if "%" in _text(value):
        raise ValueError  # a zone is meaningless on other machines
    network = _network(value)
    if isinstance(network, IPv6Network) and network.prefixlen >= _MAPPED:
        mapped = network.network_address.ipv4_mapped
        return network if mapped is None else IPv4Network((mapped, network.prefixlen - _MAPPED))
    return network


def parse_size(text: str) -> int:
    """Parse `512B`, `256KiB` or `1MiB` to bytes. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if not found or not int(found[1]):
        raise ValueError
    return int(found[1]) * _BYTES[found[2]]


def _result(value: object) -> str:
    if value not in _RESULTS and not _STATUS.fullmatch(_text(value)):
        raise ValueError
    return str(value)


def shown_duration(seconds: float) -> str:
    """Format seconds as in the rules: 90m, 1h."""
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    return next(
        (f"{seconds / unit:.0f}{name}" for name, unit in units if seconds % unit == 0), f"{seconds * 1000:.0f}ms"
    )


def duration(minimum: float, maximum: float) -> Scalar:
    """Return the kind of a duration between two bounds, in seconds."""

    def parse(value: object) -> float:
        seconds = parse_duration(_text(value))
        if not minimum <= seconds <= maximum:
            raise ValueError
        return seconds

    return Scalar(
        f"a duration from {shown_duration(minimum)} to {shown_duration(maximum)}, such as 5s, 2m or 1h30m",
        parse,
        pattern(DURATION),
    )


def integer(minimum: int, maximum: int | None = None) -> Scalar:
    """Return the kind of an integer between two bounds."""

    def parse(value: object) -> int:
        if type(value) is not int or value < minimum or (maximum is not None and value > maximum):
            raise ValueError
        return value

    expected = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    return Scalar(
        expected, parse, {"type": "integer", "minimum": minimum} | ({} if maximum is None else {"maximum": maximum})
    )


def number(minimum: float, maximum: float) -> Scalar:
    """Return the kind of a number between two bounds."""

    def parse(value: object) -> float:
        if type(value) not in (int, float) or not minimum <= value <= maximum:  # type: ignore[operator] # a number, by then
            raise ValueError
        return float(value)  # type: ignore[arg-type] # the same

    return Scalar(
        f"a number from {minimum:g} to {maximum:g}", parse, {"type": "number", "minimum": minimum, "maximum": maximum}
    )


def choice(*names: str, parse: Callable[[Any], object] = str) -> Scalar:
    """Return the kind of a string from a closed set."""

    def parse_choice(value: object) -> object:
        if value not in names:
            raise ValueError
        return parse(value)

    return Scalar(f"one of {', '.join(names)}", parse_choice, {"type": "string", "enum": list(names)}, choices=names)


def pattern(pattern: re.Pattern[str]) -> dict[str, object]:
    return {"type": "string", "pattern": f"^{pattern.pattern}$"}


TEXT = Scalar("a string", _text, {"type": "string"})
NAME = Scalar(
    "a name of lower-case letters, digits, '-', '_' and '.', at most 63, that starts with a letter or a digit",
    matching(NAME_PATTERN),
    pattern(NAME_PATTERN),
)
"""A new name. The pattern is in `model.py`, which also checks names in records; the text here repeats it."""
NAME_REF = Scalar("a name", _text, pattern(NAME_PATTERN), is_name_ref=True)
FILE_REF = Scalar("a file or a glob", _text, {"type": "string"}, is_name_ref=True)
URL = Scalar(
    "an http or https URL",
    http_url,
    {"type": "string", "pattern": "^https?://"},
    is_secret=True,
    unresolved=unresolved_url,
)
HEADER = Scalar("a header's name, such as X-Team", _header, pattern(TOKEN))
DURATION_STEP = duration(0.1, 30 * 86400)
RATE = Scalar("a rate such as 100/s, 10/m or 5/h", lambda value: parse_rate(_text(value)), pattern(_RATE))
SIZE = Scalar("a size such as 512B, 256KiB or 1MiB", lambda value: parse_size(_text(value)), pattern(_SIZE))
PEER_NETWORK = Scalar(
    "an address or a network such as 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32", _peer_network, {"type": "string"}
)


def secret(expected: str, pattern: re.Pattern[str]) -> Scalar:
    return Scalar(expected, matching(pattern), {"type": "string"}, is_secret=True, unresolved=str)


def _key(value: object) -> bytes:
    key = _text(value).encode("utf-8", "surrogatepass")
    if len(key) < WEAK:
        raise ValueError(f"expected a secret of at least {WEAK} bytes, got a shorter one")
    return key


SECRET = Scalar(f"a secret of at least {WEAK} bytes", _key, {"type": "string"}, is_secret=True, unresolved=str.encode)
# Without a placeholder: `destination_credentials.py` and `client_certificates.py` check its content.
PEM = Scalar("a string in PEM", _text, {"type": "string"}, is_secret=True)
