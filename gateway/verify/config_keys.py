"""The keys allowed under a source's `verify:`: how each is parsed, and its JSON Schema.

No message repeats a secret, nor a value that is written in place of one.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gateway.text import did_you_mean, kind_of, parse_duration, shown
from gateway.verify.content import FieldPath, parse_field_path
from gateway.verify.encodings import ENCODINGS, SECRET_ENCODINGS
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.json_web_tokens import ALGORITHMS as JWT_ALGORITHMS
from gateway.verify.json_web_tokens import ASYMMETRIC, SYMMETRIC
from gateway.verify.public_keys import ALGORITHMS as PUBLIC_KEY_ALGORITHMS
from gateway.verify.remote_keys import is_host, is_path
from gateway.verify.signed_string import BODY, EXPECTED, SignedString, parse_signed_string, parse_template
from gateway.verify.sns import TOPIC
from gateway.verify.tokens import PARAMETER, TOKEN

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
    """A secret or a public key, and its position in the list."""

    position: int
    text: str


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


def _read_header(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and TOKEN.fullmatch(value):
        return value
    raise InvalidValueError("a header's name", value)


def _read_headers(value: object, where: ConfigPath) -> tuple[str, ...]:
    """Parse a header's name, several, or a numbered one such as `X-Signature-{n}`."""
    names: list[str] = []
    given: list[object] = value if isinstance(value, list) and value else [value]
    for each in given:
        before, number, after = each.partition("{n}") if isinstance(each, str) else ("", "", "")
        name = _read_header(before + after if number else each, where)
        names += [f"{before}{n}{after}" for n in range(1, MAX_NUMBERED + 1)] if number else [name]
    return tuple(names)


def _read_field(value: object, _: ConfigPath) -> FieldPath:
    try:
        return parse_field_path(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidValueError("the path of a JSON field such as data.signature", value) from error


def _read_fields(value: object, _: ConfigPath) -> FieldPath:
    try:
        return parse_field_path(value if isinstance(value, str) else "", takes_all=True)
    except ValueError as error:
        raise InvalidValueError("the path of a JSON field such as data.token or value.*.token", value) from error


def _read_parameter(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and PARAMETER.fullmatch(value):
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


def _list_of(what: str) -> Callable[[object, ConfigPath], tuple[Secret, ...]]:
    def read(value: object, where: ConfigPath) -> tuple[Secret, ...]:
        # Nothing here shows a value: a malformed secret, such as a number without quotes, is still a secret.
        if not isinstance(value, list) or not value:
            where.report(f"expected a list of {what}, got {kind_of(value)}")
            return ()
        texts = []
        for index, text in enumerate(value):
            if isinstance(text, str) and text.strip():
                texts.append(Secret(index, text))
            else:
                where.below(index).report(f"expected a non-empty string, got {kind_of(text)}")
        return tuple(texts)

    return read


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


def _read_timestamp(value: object, where: ConfigPath) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping with header, prefix, position or field", value)
    given = [name for name in _TIMESTAMP_PLACES if name in value]
    if len(given) != 1:
        where.report(f"expected one of {', '.join(_TIMESTAMP_PLACES)}, got {' and '.join(given) or 'none'}")
    return read_keys(value, _TIMESTAMP_KEYS, where)


def _read_key_url(value: object, where: ConfigPath) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping with header or field, and hosts", value)
    given = [name for name in _KEY_URL_PLACES if name in value]
    if len(given) != 1:
        where.report(f"expected one of {', '.join(_KEY_URL_PLACES)}, got {' and '.join(given) or 'none'}")
    return read_keys(value, _KEY_URL_KEYS, where)


def _read_hosts(value: object, _: ConfigPath) -> tuple[str, ...]:
    hosts = tuple(value) if isinstance(value, list) else ()
    if hosts and all(isinstance(host, str) and is_host(host) for host in hosts):
        return hosts
    raise InvalidValueError("a list of hosts in lower case, in which * stands for one label", value)


def _read_path(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and is_path(value):
        return value
    raise InvalidValueError("what the path of an address starts with, such as /keys/", value)


def _read_topics(value: object, where: ConfigPath) -> tuple[str, ...]:
    topics = []
    for topic in _list_of("topics")(value, where):
        if TOPIC.fullmatch(topic.text):
            topics.append(topic.text)
        else:
            where.below(topic.position).report(f"expected the ARN of a topic, got {shown(topic.text)}")
    return tuple(topics)


def _read_https(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and value.startswith("https://") and "*" not in value:
        host, slash, path = value.removeprefix("https://").partition("/")
        if is_host(host) and is_path(slash + path or "/"):
            return value
    raise InvalidValueError("an https address of a host and a path, without a port or a query", value)


_GIVEN = re.compile(r"[!-z~]+")  # visible ASCII, without what templates and signed strings are divided by


def _read_given(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and _GIVEN.fullmatch(value):
        return value
    raise InvalidValueError("a string of visible ASCII characters", value)


def asked_key(what: str) -> Key:
    """Return the key for something that a provider's file asks of its user."""
    return Key(_read_given, {**_text(what), "pattern": f"^{_GIVEN.pattern}$"}, is_required=True)


def _read_position(value: object, _: ConfigPath) -> int:
    if value == 1 and not isinstance(value, bool):
        return 1
    raise InvalidValueError("1, the first element of the signature's header", value)


def _read_signed(value: object, _: ConfigPath) -> SignedString:
    try:
        return parse_signed_string(value if isinstance(value, str) else "")
    except ValueError as error:
        raise InvalidValueError(EXPECTED, value) from error


def _read_body_digest(value: object, where: ConfigPath) -> str | None:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping with query", value)
    parameter: str | None = read_keys(value, _BODY_DIGEST_KEYS, where).get("query")
    return parameter


def refuse_uncovered(values: Mapping[str, Any], where: ConfigPath) -> None:
    """Report a signed string that vouches for nothing of the body. `values` lacks those that have a problem."""
    signed: SignedString | None = values.get("signed")
    if signed is None:
        return
    if "body_digest" not in values:
        if not (signed.covers_body or signed.has("field")):
            where.below("signed").report("expected {body} in it, or the key 'body_digest', got neither")
    elif (name := values["body_digest"]) is not None and not signed.covers_parameter(name):
        expected = f"expected {{url}} or {{query:{name}}} in 'signed', as a digest is anybody's unsigned"
        where.below("body_digest").report(f"{expected}, got neither")


def _read_claims(value: object, where: ConfigPath) -> tuple[tuple[str, SignedString], ...]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping of claims to strings", value)
    claims = []
    for name, text in value.items():
        try:
            claims.append((str(name), parse_template(text if isinstance(text, str) else "{")))
        except ValueError:
            where.below(str(name)).report(f"expected a string, or a template as in 'signed', got {shown(text)}")
    return tuple(claims)


def _read_algorithms(value: object, _: ConfigPath) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    for kind in (SYMMETRIC, ASYMMETRIC):  # one kind alone: a public key must never be taken for a secret
        if given and all(each in kind for each in given):
            return tuple(given)
    raise InvalidValueError(f"one or several of {', '.join(SYMMETRIC)}, or of {', '.join(ASYMMETRIC)}", value)


MAX_NUMBERED = 10  # headers of a numbered name: DocuSign has one for each of a source's secrets
_ALGORITHMS = ("sha256", "sha1", "sha512")


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "description": description}


def _choice(choices: Iterable[str], default: str, description: str) -> Key:
    known = list(choices)
    return Key(_one_of(known), {"enum": known, "default": default, "description": description}, default=default)


_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
SECRETS = Key(
    _list_of("secrets"),
    {**_TEXTS, "description": "Any of them will do, for rotation; the first one signs test events."},
    is_required=True,
)
PUBLIC_KEYS = Key(
    _list_of("public keys"),
    {**_TEXTS, "description": "As PEM or base64, of Ed25519 also the 32 bytes in hex or base64; any of them will do."},
)
VERIFY_TOKENS = SECRETS._replace(
    schema={**SECRETS.schema, "description": "The tokens of the handshake (Meta's verify token); any will do."},
    is_required=False,
)
HANDSHAKE = Key(
    _one_of(HANDSHAKES), {"enum": list(HANDSHAKES), "description": "The provider's handshake that is answered."}
)
TOLERANCE = Key(
    _read_tolerance,
    {
        "type": "string",
        "pattern": r"^(none|(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
        "description": "How far a signed timestamp may be from now, in both directions; `none` for any.",
    },
)
_TIMESTAMP_PLACES = ("header", "prefix", "position", "field")
_TIMESTAMP_KEYS: Mapping[str, Key] = {
    "header": Key(_read_header, _text("The header that holds the timestamp.")),
    "prefix": Key(_read_ascii, _text("What the timestamp starts with, as an element of the signature's header.")),
    "position": Key(_read_position, {"const": 1, "description": "The timestamp is that element of the header."}),
    "field": Key(_read_field, _text("The field of the JSON body that holds the timestamp.")),
    "unit": _choice(("s", "ms", "iso"), "s", "Unix seconds, Unix milliseconds, or RFC 3339."),
}
_BODY_DIGEST_KEYS: Mapping[str, Key] = {
    "query": Key(_read_parameter, _text("The query parameter that holds the digest."), is_required=True),
}
_KEY_URL_PLACES = ("header", "field")
_KEY_URL_KEYS: Mapping[str, Key] = {
    "header": Key(_read_header, _text("The header that holds the address.")),
    "field": Key(_read_field, _text("The field of the JSON body that holds the address.")),
    "hosts": Key(
        _read_hosts,
        {**_TEXTS, "description": "The hosts that it may have; * stands for one label. A path alone is the first's."},
        is_required=True,
    ),
    "path": Key(_read_path, {**_text("What its path starts with."), "default": "/"}, default="/"),
}
KEY_URL = Key(
    _read_key_url,
    {
        "type": "object",
        "properties": {name: dict(key.schema) for name, key in _KEY_URL_KEYS.items()},
        "required": ["hosts"],
        "oneOf": [{"required": [name]} for name in _KEY_URL_PLACES],
        "additionalProperties": False,
        "description": "Where a request names the address, in https, at which its key or certificate is (PEM).",
    },
)
_HEADERS = {
    "description": "The header that holds the signature, or several; {n} is 1 to 10.",
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    ],
}
_LOCATION: Mapping[str, Key] = {
    "header": Key(_read_headers, _HEADERS),
    "query": Key(_read_parameter, _text("The query parameter that holds the signature.")),
    "field": Key(_read_field, _text("The field of the JSON body that holds the signature.")),
}
_SIGNATURE: Mapping[str, Key] = {
    **_LOCATION,
    "encoding": _choice(ENCODINGS, "hex", "How the signature is written."),
    "separator": Key(_read_ascii, _text("What stands between several elements in the header.")),
    "prefix": Key(_read_ascii, _text("What a signature starts with; other elements are ignored."), default=b""),
    "timestamp": Key(
        _read_timestamp,
        {
            "type": "object",
            "properties": {name: dict(key.schema) for name, key in _TIMESTAMP_KEYS.items()},
            "oneOf": [{"required": [name]} for name in _TIMESTAMP_PLACES],
            "additionalProperties": False,
            "description": "Where the signed timestamp is.",
        },
    ),
    "id_header": Key(_read_header, _text("A header that identifies the event, {id} in the signed string.")),
    "signed": Key(
        _read_signed,
        {**_text(f"The signed string: {EXPECTED.partition(' with ')[2]}."), "default": "{body}"},
        default=SignedString((BODY,)),
    ),
    "tolerance": TOLERANCE,
}
_LOCATIONS = ("header", "query", "field")
CHOICES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "hmac": (_LOCATIONS,),
    "hash": (_LOCATIONS,),
    "public-key": (_LOCATIONS, ("public_keys", "key_url")),
    "token": (_LOCATIONS,),
}
"""The keys of which a scheme takes exactly one: where a signature or credential is, and where its key."""
_SCHEMES: Mapping[str, Mapping[str, Key]] = {
    "hmac": {
        **_SIGNATURE,
        "algorithm": _choice(_ALGORITHMS, "sha256", "The hash function of the HMAC."),
        "secrets": SECRETS,
        "secret_encoding": _choice(SECRET_ENCODINGS, "raw", "How the secrets are written."),
        "body_digest": Key(
            _read_body_digest,
            {
                "type": "object",
                "properties": {name: dict(key.schema) for name, key in _BODY_DIGEST_KEYS.items()},
                "required": ["query"],
                "additionalProperties": False,
                "description": "Where the signed SHA-256 of the body is, in hexadecimal digits.",
            },
        ),
    },
    "hash": {
        **_SIGNATURE,
        "algorithm": _choice(_ALGORITHMS, "sha256", "The hash function."),
        "secrets": SECRETS,
    },
    "public-key": {
        **_SIGNATURE,
        "algorithm": Key(
            _one_of(PUBLIC_KEY_ALGORITHMS),
            {"enum": list(PUBLIC_KEY_ALGORITHMS), "description": "The algorithm of the signature."},
            is_required=True,
        ),
        "public_keys": PUBLIC_KEYS,
        "key_url": KEY_URL,
    },
    "token": {
        "header": Key(_read_header, _text("The header that holds the token.")),
        "query": Key(_read_parameter, _text("The query parameter that holds the token.")),
        "field": Key(_read_fields, _text("The field of the JSON body that holds the token; * is each item of a list.")),
        "prefix": Key(_read_ascii, _text("What stands before the token in the header.")),
        "secrets": SECRETS,
    },
    "jwt": {
        "header": Key(_read_header, _text("The header that holds the token."), default="Authorization"),
        "algorithms": Key(
            _read_algorithms,
            {
                "anyOf": [
                    {"enum": list(JWT_ALGORITHMS)},
                    {"type": "array", "items": {"enum": list(JWT_ALGORITHMS)}, "minItems": 1},
                ],
                "description": "The algorithms that are accepted: HS… with secrets, the others with public keys.",
            },
            is_required=True,
        ),
        "claims": Key(
            _read_claims,
            {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "Claims, and what each has to be: a string, or a template such as {body:sha256}.",
            },
            default=(),
        ),
        "tolerance": TOLERANCE,
        "key_set": Key(
            _read_https,
            {
                **_text("The https address of the sender's keys (JWKS), fetched when they are needed."),
                "pattern": "^https://",
            },
        ),
        "secrets": SECRETS._replace(is_required=False),
        "public_keys": PUBLIC_KEYS._replace(is_required=False),
    },
    "basic": {
        "username": Key(_read_username, _text("The user's name."), is_required=True),
        "secrets": SECRETS._replace(schema={**SECRETS.schema, "description": "The user's passwords; any will do."}),
    },
    "bearer": {"secrets": SECRETS},
    "none": {},
}
GENERIC: Mapping[str, Mapping[str, Key]] = {
    scheme: {**keys, "handshake": HANDSHAKE, "verify_tokens": VERIFY_TOKENS} for scheme, keys in _SCHEMES.items()
}
OF_PRESETS: Mapping[str, Mapping[str, Key]] = {
    "sns-message": {
        "topics": Key(
            _read_topics, {**_TEXTS, "description": "The ARNs of the topics that may send."}, is_required=True
        ),
    },
}
"""Schemes of a provider's file alone, with the keys that its user gives."""
SCHEMES: Mapping[str, Mapping[str, Key]] = {**GENERIC, **OF_PRESETS}
