"""The keys allowed under a source's `verify:`: how each is parsed, and its JSON Schema.

No message repeats a secret, nor a value that is written in place of one.
"""

import binascii
import functools
import math
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any, NamedTuple

from gateway.text import did_you_mean, kind_of, parse_duration, shown

Path = tuple[str | int, ...]


class ConfigPath:
    """A position in the configuration, and the problems found so far."""

    def __init__(self, path: Path, problems: dict[tuple[Path, str], None]) -> None:
        self._path = path
        self._problems = problems

    def below(self, key: str | int) -> "ConfigPath":
        return ConfigPath((*self._path, key), self._problems)

    def report(self, message: str) -> None:
        self._problems[self._path, message] = None


class InvalidValueError(Exception):
    """A value isn't what a key accepts."""

    def __init__(self, expected: str, value: object) -> None:
        super().__init__(f"expected {expected}, got {shown(value)}")


class Key(NamedTuple):
    """An allowed key: how its value is parsed (raises InvalidValueError, or reports below), and its JSON Schema."""

    read: Callable[[Any, ConfigPath], Any]
    schema: Mapping[str, Any]
    is_required: bool = False
    default: Any = None


class Secret(NamedTuple):
    """A secret, and its position in the list."""

    position: int
    text: str


class Part(NamedTuple):
    """A field of the signed string; `name` is a lower-case header name for `header` and `id`."""

    kind: str
    name: bytes = b""


def read_keys(config: Mapping[Any, object], keys: Mapping[str, Key], where: ConfigPath) -> dict[str, Any]:
    """Parse a mapping's values, with defaults for missing keys; one that can't be parsed is reported and omitted."""
    for name in config:
        if name not in keys and name != "scheme":
            where.below(str(name)).report(f"unknown key {str(name)!r}{did_you_mean(str(name), keys)}")
    values = {}
    for name, key in keys.items():
        if name in config:
            try:
                values[name] = key.read(config[name], where.below(name))
            except InvalidValueError as error:
                where.below(name).report(str(error))
        elif key.is_required:
            where.report(f"expected the key '{name}', got none")
        elif key.default is not None:
            values[name] = key.default
    return values


TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2: a header's name


def _read_header(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and TOKEN.fullmatch(value):
        return value
    raise InvalidValueError("a header's name", value)


def _read_parameter(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9A-Za-z._~-]+", value):
        return value
    raise InvalidValueError("a query parameter's name of letters, digits and ._~-", value)


def _read_ascii(value: object, _: ConfigPath) -> bytes:
    if isinstance(value, str) and value and value.isascii() and value.isprintable():
        return value.encode()
    raise InvalidValueError("a string of printable ASCII characters", value)


def _read_username(value: object, _: ConfigPath) -> str:
    # RFC 7617, section 2: a user-id with a colon is invalid.
    if isinstance(value, str) and value and ":" not in value:
        return value
    raise InvalidValueError("a user name without a colon", value)


def _read_secrets(value: object, where: ConfigPath) -> tuple[Secret, ...]:
    # Nothing here shows a value: a malformed secret, such as a number without quotes, is still a secret.
    if not isinstance(value, list) or not value:
        where.report(f"expected a list of secrets, got {kind_of(value)}")
        return ()
    secrets = []
    for index, text in enumerate(value):
        if isinstance(text, str) and text.strip():
            secrets.append(Secret(index, text))
        else:
            where.below(index).report(f"expected a non-empty string, got {kind_of(text)}")
    return tuple(secrets)


def _one_of(choices: Iterable[str]) -> Callable[[object, ConfigPath], str]:
    known = list(choices)

    def read(value: object, _: ConfigPath) -> str:
        if isinstance(value, str) and value in known:
            return value
        raise InvalidValueError(f"one of {', '.join(known)}", value)

    return read


def _read_tolerance(value: object, _: ConfigPath) -> float:
    if value == "none":
        return math.inf
    try:
        seconds = parse_duration(value) if isinstance(value, str) else 0
    except ValueError:
        seconds = 0
    if not seconds:
        raise InvalidValueError("a duration such as 5m, or none", value)
    return seconds


def base64_key(text: str) -> bytes:
    """Return the key that a base64 secret encodes. Raises ValueError for any other string, and for an empty key."""
    bare = text.rstrip("=")
    key = binascii.a2b_base64(bare + "=" * (-len(bare) % 4), strict_mode=True)  # Some issuers leave the padding out.
    if not key:  # anyone could make its signatures
        raise ValueError
    return key


def signing_key(text: str) -> bytes:
    """Return the key of a Standard Webhooks secret: base64, after `whsec_` or without it. Raises ValueError."""
    return base64_key(text.removeprefix("whsec_"))


def _read_timestamp(value: object, where: ConfigPath) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping with header or prefix", value)
    if ("header" in value) == ("prefix" in value):
        where.report(f"expected either header or prefix, got {'both' if 'header' in value else 'neither'}")
    return read_keys(value, _TIMESTAMP_KEYS, where)


BODY, TIMESTAMP, ID, URL = Part("body"), Part("timestamp"), Part("id"), Part("url")
_PARTS = ("body", "timestamp", "id", "method", "path", "url", "header")


def _read_signed(value: object, _: ConfigPath) -> tuple[bytes | Part, ...]:
    invalid = InvalidValueError(
        "a string with {body} and, in braces, only timestamp, id, method, path, url, header:NAME", value
    )
    if not isinstance(value, str):
        raise invalid
    parts: list[bytes | Part] = []
    try:
        for literal, kind, name, conversion in Formatter().parse(value):
            if literal:
                parts.append(literal.encode())
            if kind is None:
                continue
            is_named = bool(TOKEN.fullmatch(name or ""))
            if kind not in _PARTS or conversion or (kind == "header") != is_named or (name and not is_named):
                raise invalid
            parts.append(Part(kind, (name or "").lower().encode()))
    except ValueError as error:  # unbalanced braces
        raise invalid from error
    if BODY not in parts:  # a signature that doesn't cover the body vouches for nothing
        raise invalid
    return tuple(parts)


_ALGORITHMS = ("sha256", "sha1", "sha512")
ENCODINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "hex": binascii.hexlify,
    "base64": functools.partial(binascii.b2a_base64, newline=False),
    "base64url": lambda digest: urlsafe_b64encode(digest).rstrip(b"="),  # as JWS has it, RFC 7515, section 2
}
SECRET_ENCODINGS = {
    "raw": "a string",
    "hex": "hexadecimal digits",
    "base64": "base64",
    "whsec": "base64 after whsec_",
}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "description": description}


def _choice(choices: Iterable[str], default: str, description: str) -> Key:
    known = list(choices)
    return Key(_one_of(known), {"enum": known, "default": default, "description": description}, default=default)


SECRETS = Key(
    _read_secrets,
    {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "minItems": 1,
        "description": "Any of them will do, for rotation; the first one signs test events.",
    },
    is_required=True,
)
TOLERANCE = Key(
    _read_tolerance,
    {
        "type": "string",
        "pattern": r"^(none|(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
        "description": "How far a signed timestamp may be from now, in both directions; `none` for any.",
    },
)
_TIMESTAMP_KEYS: Mapping[str, Key] = {
    "header": Key(_read_header, _text("The header that holds the timestamp.")),
    "prefix": Key(_read_ascii, _text("What the timestamp starts with, as an element of the signature's header.")),
    "unit": _choice(("s", "ms", "iso"), "s", "Unix seconds, Unix milliseconds, or RFC 3339."),
}
GENERIC: Mapping[str, Mapping[str, Key]] = {
    "hmac": {
        "header": Key(_read_header, _text("The header that holds the signature."), is_required=True),
        "algorithm": _choice(_ALGORITHMS, "sha256", "The hash function of the HMAC."),
        "encoding": _choice(ENCODINGS, "hex", "How the signature is written."),
        "separator": Key(_read_ascii, _text("What stands between several elements in the header.")),
        "prefix": Key(_read_ascii, _text("What a signature starts with; other elements are ignored."), default=b""),
        "timestamp": Key(
            _read_timestamp,
            {
                "type": "object",
                "properties": {name: dict(key.schema) for name, key in _TIMESTAMP_KEYS.items()},
                "oneOf": [{"required": ["header"]}, {"required": ["prefix"]}],
                "additionalProperties": False,
                "description": "Where the signed timestamp is.",
            },
        ),
        "id_header": Key(_read_header, _text("A header that identifies the event, {id} in the signed string.")),
        "signed": Key(
            _read_signed,
            {
                **_text("The signed string: {body} {timestamp} {id} {method} {path} {url} {header:NAME}."),
                "default": "{body}",
            },
            default=(BODY,),
        ),
        "tolerance": TOLERANCE,
        "secrets": SECRETS,
        "secret_encoding": _choice(SECRET_ENCODINGS, "raw", "How the secrets are written."),
    },
    "token": {
        "header": Key(_read_header, _text("The header that holds the token.")),
        "query": Key(_read_parameter, _text("The query parameter that holds the token.")),
        "secrets": SECRETS,
    },
    "basic": {
        "username": Key(_read_username, _text("The user's name."), is_required=True),
        "secrets": SECRETS._replace(schema={**SECRETS.schema, "description": "The user's passwords; any will do."}),
    },
    "bearer": {"secrets": SECRETS},
    "none": {},
}
