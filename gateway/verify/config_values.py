"""How single values under `verify:` are parsed. No message repeats a secret, nor what is written in place of one."""

import math
import re
from collections.abc import Callable, Iterable, Mapping

from gateway.text import DURATION, kind_of, parse_duration, shown
from gateway.verify.config_reader import ConfigPath, InvalidValueError
from gateway.verify.content import FieldPath, parse_field_path
from gateway.verify.json_web_tokens import ASYMMETRIC, SYMMETRIC
from gateway.verify.key_ring import EXPECTED_UNTIL, parse_until
from gateway.verify.message_signatures import MAX_COMPONENTS, MAX_KEY_ID, Component, parse_component
from gateway.verify.remote_keys import is_host, is_path
from gateway.verify.signed_string import EXPECTED, SignedString, parse_signed_string, parse_template
from gateway.verify.tokens import PARAMETER, TOKEN

SPLIT = re.compile(r"off|body(\.[A-Za-z_$][\w$-]*)*")
EXPECTED_WINDOW = "a duration from 1s to 7d, such as 5s, 2m or 1h30m, or off"
WINDOW = {"type": "string", "pattern": f"^off$|^{DURATION.pattern}$"}
_MIN_WINDOW, _MAX_WINDOW = 1, 7 * 86400
MAX_NUMBERED = 10  # headers of a numbered name: DocuSign has one for each of a source's secrets


def read_header(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and TOKEN.fullmatch(value):
        return value
    raise InvalidValueError("a header's name", value)


def read_headers(value: object, where: ConfigPath) -> tuple[str, ...]:
    """Parse a header's name, several, or a numbered one such as `X-Signature-{n}`."""
    names: list[str] = []
    given: list[object] = value if isinstance(value, list) and value else [value]
    for each in given:
        before, number, after = each.partition("{n}") if isinstance(each, str) else ("", "", "")
        name = read_header(before + after if number else each, where)
        names += [f"{before}{n}{after}" for n in range(1, MAX_NUMBERED + 1)] if number else [name]
    return tuple(names)


def read_field(value: object, _: ConfigPath) -> FieldPath:
    try:
        return parse_field_path(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidValueError("the path of a JSON field such as data.signature", value) from error


def read_fields(value: object, _: ConfigPath) -> FieldPath:
    try:
        return parse_field_path(value if isinstance(value, str) else "", takes_all=True)
    except ValueError as error:
        raise InvalidValueError("the path of a JSON field such as data.token or value.*.token", value) from error


def read_parameter(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and PARAMETER.fullmatch(value):
        return value
    raise InvalidValueError("a query parameter's name of letters, digits and ._~-", value)


def read_ascii(value: object, _: ConfigPath) -> bytes:
    if isinstance(value, str) and value and value.isascii() and value.isprintable():
        return value.encode()
    raise InvalidValueError("a string of printable ASCII characters", value)


def read_username(value: object, _: ConfigPath) -> str:
    # RFC 7617, section 2: a user-id with a colon is invalid.
    if isinstance(value, str) and value and ":" not in value:
        return value
    raise InvalidValueError("a user name without a colon", value)


def read_text(value: object, where: ConfigPath) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    where.report(f"expected a non-empty string, got {kind_of(value)}")
    return None


def read_until(value: object, where: ConfigPath) -> float:
    try:
        return parse_until(value if isinstance(value, str) else "")
    except ValueError:  # not shown either: it is the secret, where the two were exchanged
        where.report(f"expected {EXPECTED_UNTIL}, got {'another string' if isinstance(value, str) else kind_of(value)}")
        return math.inf


def read_keyid(value: object, where: ConfigPath) -> str | None:
    if isinstance(value, str) and 0 < len(value) <= MAX_KEY_ID and value.isascii() and value.isprintable():
        return value
    expected = f"expected at most {MAX_KEY_ID} printable ASCII characters"  # not shown either, for the same reason
    where.report(f"{expected}, got {'another string' if isinstance(value, str) else kind_of(value)}")
    return None


def read_pending(value: object, _: ConfigPath) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidValueError("true or false", value)


def read_tag(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_KEY_ID and value.isascii() and value.isprintable():
        return value
    raise InvalidValueError(f"at most {MAX_KEY_ID} printable ASCII characters", value)


def read_covered(value: object, where: ConfigPath) -> tuple[Component, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_COMPONENTS:
        raise InvalidValueError(f"a list of 1 to {MAX_COMPONENTS} components such as @method or content-type", value)
    components: dict[Component, None] = {}
    for index, each in enumerate(value):
        try:
            components[parse_component(each if isinstance(each, str) else "")] = None
        except ValueError:
            expected = 'expected a component of a request, such as @target-uri, date or @query-param;name="id"'
            where.below(index).report(f"{expected}, got {shown(each)}")
    return tuple(components)


def one_of(choices: Iterable[str]) -> Callable[[object, ConfigPath], str]:
    known = list(choices)

    def read(value: object, _: ConfigPath) -> str:
        if isinstance(value, str) and value in known:
            return value
        raise InvalidValueError(f"one of {', '.join(known)}", value)

    return read


def read_tolerance(value: object, _: ConfigPath) -> float:
    if value == "none":
        return math.inf
    try:
        seconds = parse_duration(value) if isinstance(value, str) else 0
    except ValueError:
        seconds = 0
    if not seconds:
        raise InvalidValueError("a duration such as 5m, or none", value)
    return seconds


def read_hosts(value: object, _: ConfigPath) -> tuple[str, ...]:
    hosts = tuple(value) if isinstance(value, list) else ()
    if hosts and all(isinstance(host, str) and is_host(host) for host in hosts):
        return hosts
    raise InvalidValueError("a list of hosts in lower case, in which * stands for one label", value)


def read_path(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and is_path(value):
        return value
    raise InvalidValueError("what the path of an address starts with, such as /keys/", value)


def read_https(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and value.startswith("https://") and "*" not in value:
        host, slash, path = value.removeprefix("https://").partition("/")
        if is_host(host) and is_path(slash + path or "/"):
            return value
    raise InvalidValueError("an https address of a host and a path, without a port or a query", value)


GIVEN = re.compile(r"[!-z~]+")  # visible ASCII, without what templates and signed strings are divided by


def read_given(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and GIVEN.fullmatch(value):
        return value
    raise InvalidValueError("a string of visible ASCII characters", value)


def read_position(value: object, _: ConfigPath) -> int:
    if value == 1 and not isinstance(value, bool):
        return 1
    raise InvalidValueError("1, the first element of the signature's header", value)


def read_signed(value: object, _: ConfigPath) -> SignedString:
    try:
        return parse_signed_string(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidValueError(EXPECTED, value) from error


def read_claims(value: object, where: ConfigPath) -> tuple[tuple[str, SignedString | bool], ...]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping of claims to strings or booleans", value)
    claims: list[tuple[str, SignedString | bool]] = []
    for name, text in value.items():
        try:
            claims.append((str(name), text if isinstance(text, bool) else parse_template(_template(text))))
        except ValueError:
            expected = "expected a string, a template as in 'signed', true or false"
            where.below(str(name)).report(f"{expected}, got {shown(text)}")
    return tuple(claims)


def _template(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(value)


def read_algorithms(value: object, _: ConfigPath) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    for kind in (SYMMETRIC, ASYMMETRIC):  # one kind alone: a public key must never be taken for a secret
        if given and all(each in kind for each in given):
            return tuple(given)
    raise InvalidValueError(f"one or several of {', '.join(SYMMETRIC)}, or of {', '.join(ASYMMETRIC)}", value)


def parse_window(value: object) -> float | None:
    """Return for how many seconds a repeated event is a duplicate; None for `off`. Raises ValueError."""
    if value == "off":
        return None
    seconds = parse_duration(value) if isinstance(value, str) else 0
    if not _MIN_WINDOW <= seconds <= _MAX_WINDOW:
        raise ValueError
    return seconds
