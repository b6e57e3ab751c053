"""The keys allowed under a source's `verify:`: how each is parsed, and its JSON Schema.

No message repeats a secret, nor a value that is written in place of one.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gateway.text import kind_of, shown
from gateway.verify.boundaries import AmbiguousError
from gateway.verify.config_reader import ConfigPath, InvalidValueError, Key, read_keys
from gateway.verify.config_values import (
    GIVEN,
    one_of,
    read_algorithms,
    read_ascii,
    read_claims,
    read_covered,
    read_field,
    read_fields,
    read_given,
    read_header,
    read_headers,
    read_hosts,
    read_https,
    read_keyid,
    read_parameter,
    read_path,
    read_pending,
    read_position,
    read_signed,
    read_tag,
    read_text,
    read_tolerance,
    read_until,
    read_username,
)
from gateway.verify.encodings import ENCODINGS, SECRET_ENCODINGS
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.json_web_tokens import ALGORITHMS as JWT_ALGORITHMS
from gateway.verify.key_ring import UNTIL
from gateway.verify.message_signatures import ALGORITHMS as MESSAGE_ALGORITHMS
from gateway.verify.message_signatures import MAX_COMPONENTS
from gateway.verify.public_keys import ALGORITHMS as PUBLIC_KEY_ALGORITHMS
from gateway.verify.signed_string import BODY, EXPECTED, SignedString
from gateway.verify.sns import TOPIC


class Secret(NamedTuple):
    """A secret or a public key, its position in the list, and until when it verifies.

    `secret_index` is that among all secrets and public keys of the source; None in a provider's file. `keyid` is what
    its sender calls it in a message signature, if that is known.
    """

    position: int
    text: str
    until: float = math.inf
    secret_index: int | None = None
    keyid: str | None = None


def _list_of(
    what: str, *, may_expire: bool = False, may_have_id: bool = False
) -> Callable[[object, ConfigPath], tuple[Secret, ...]]:
    """Return how a list of strings is parsed; an item may be a mapping of a string, its expiry, and its id."""

    def read(value: object, where: ConfigPath) -> tuple[Secret, ...]:
        # Nothing here shows a value: a malformed secret, such as a number without quotes, is still a secret.
        if not isinstance(value, list) or not value:
            where.report(f"expected a list of {what}, got {kind_of(value)}")
            return ()
        secrets = []
        for index, each in enumerate(value):
            here = where.below(index)
            given: dict[str, Any] = {}
            if may_expire and isinstance(each, Mapping):
                given = _mapped(each, _NAMED_KEYS if may_have_id else _DATED_KEYS, here)
            else:
                given["secret"] = read_text(each, here)
            if given.get("secret") is not None:
                until, keyid = given.get("until", math.inf), given.get("keyid")
                secrets.append(Secret(index, given["secret"], until, keyid=keyid))
        return tuple(secrets)

    return read


def _mapped(value: Mapping[Any, object], keys: Mapping[str, Key], where: ConfigPath) -> dict[str, Any]:
    if value.keys() - keys.keys():  # whose names aren't shown
        where.report(f"expected the keys {' and '.join(keys)} alone, got others")
        return {}
    return read_keys(value, keys, where)


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


def _read_topics(value: object, where: ConfigPath) -> tuple[str, ...]:
    topics = []
    for topic in _list_of("topics")(value, where):
        if TOPIC.fullmatch(topic.text):
            topics.append(topic.text)
        else:
            where.below(topic.position).report(f"expected the ARN of a topic, got {shown(topic.text)}")
    return tuple(topics)


def asked_key(what: str) -> Key:
    """Return the key for something that a provider's file asks of its user."""
    return Key(read_given, {**_text(what), "pattern": f"^{GIVEN.pattern}$"}, is_required=True)


def _read_recipient(value: object, where: ConfigPath) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping with field and is", value)
    return read_keys(value, _RECIPIENT_KEYS, where)


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
        if not (signed.covers_body or signed.has("field") or signed.has("form_field")):
            where.below("signed").report("expected {body} in it, or the key 'body_digest', got neither")
    elif (name := values["body_digest"]) is not None and not signed.covers_parameter(name):
        expected = f"expected {{url}} or {{query:{name}}} in 'signed', as a digest is anybody's unsigned"
        where.below("body_digest").report(f"{expected}, got neither")


def refuse_ambiguous(values: Mapping[str, Any], where: ConfigPath) -> None:
    """Report a signed string, or a template of a claim, that could be that of two requests."""
    templates = [(where.below("claims").below(name), each) for name, each in values.get("claims", ())]
    if "signed" in values:
        templates.append((where.below("signed"), values["signed"]))
    for here, template in templates:
        try:
            if isinstance(template, SignedString):
                template.with_id_header(values.get("id_header")).with_guards(unit_of(values))
        except AmbiguousError as error:
            here.report(str(error))


def unit_of(values: Mapping[str, Any]) -> str | None:
    """Return the unit of a signed timestamp; None if there is none."""
    unit: str | None = (values.get("timestamp") or {}).get("unit")
    return unit


_ALGORITHMS = ("sha256", "sha1", "sha512")


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "description": description}


def _choice(choices: Iterable[str], default: str, description: str) -> Key:
    known = list(choices)
    return Key(one_of(known), {"enum": known, "default": default, "description": description}, default=default)


_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
_DATED_KEYS: Mapping[str, Key] = {
    "secret": Key(read_text, _text("The secret, or the public key."), is_required=True),
    "until": Key(
        read_until,
        {
            "type": "string",
            "pattern": f"^{UNTIL}$",
            "description": "When it ends: a time, or a date, whose day in UTC is its last.",
        },
        is_required=True,
    ),
}
_NAMED_KEYS: Mapping[str, Key] = {
    "secret": _DATED_KEYS["secret"],
    "until": _DATED_KEYS["until"]._replace(is_required=False),
    "keyid": Key(read_keyid, {**_text("What its sender calls it: other signatures aren't tried."), "maxLength": 256}),
}


def _secrets_schema(keys: Mapping[str, Key]) -> dict[str, Any]:
    named = {
        "type": "object",
        "properties": {name: dict(key.schema) for name, key in keys.items()},
        "required": [name for name, key in keys.items() if key.is_required],
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"oneOf": [{"type": "string", "minLength": 1}, named]}, "minItems": 1}


_SECRETS = _secrets_schema(_DATED_KEYS)
SECRETS = Key(
    _list_of("secrets", may_expire=True),
    {**_SECRETS, "description": "Any of them will do, for rotation; the first one signs test events."},
    is_required=True,
)
PUBLIC_KEYS = Key(
    _list_of("public keys", may_expire=True),
    {**_SECRETS, "description": "As PEM or base64, of Ed25519 also the 32 bytes in hex or base64; any will do."},
)
VERIFY_TOKENS = Key(
    _list_of("tokens"), {**_TEXTS, "description": "The tokens of the handshake (Meta's verify token); any will do."}
)
_HANDSHAKES = [
    name for name, handshake in HANDSHAKES.items() if not handshake.required_keys and not handshake.shows_token
]
HANDSHAKE = Key(one_of(_HANDSHAKES), {"enum": _HANDSHAKES, "description": "The provider's handshake that is answered."})
PENDING = Key(
    read_pending,
    {"type": "boolean", "description": "Whether the token is awaited that its provider sends: shown at /handshakes."},
)
TOLERANCE = Key(
    read_tolerance,
    {
        "type": "string",
        "pattern": r"^(none|(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
        "description": "How far a signed timestamp may be from now, in both directions; `none` for any.",
    },
)
_TIMESTAMP_PLACES = ("header", "prefix", "position", "field")
_TIMESTAMP_KEYS: Mapping[str, Key] = {
    "header": Key(read_header, _text("The header that holds the timestamp.")),
    "prefix": Key(read_ascii, _text("What the timestamp starts with, as an element of the signature's header.")),
    "position": Key(read_position, {"const": 1, "description": "The timestamp is that element of the header."}),
    "field": Key(read_field, _text("The field of the JSON body that holds the timestamp.")),
    "unit": _choice(("s", "ms", "iso"), "s", "Unix seconds, Unix milliseconds, or RFC 3339."),
}
_BODY_DIGEST_KEYS: Mapping[str, Key] = {
    "query": Key(read_parameter, _text("The query parameter that holds the digest."), is_required=True),
}
_RECIPIENT_KEYS: Mapping[str, Key] = {
    "field": Key(read_field, _text("The field of the JSON body."), is_required=True),
    "is": Key(read_tag, _text("What it has to be."), is_required=True),
}
_KEY_URL_PLACES = ("header", "field")
_KEY_URL_KEYS: Mapping[str, Key] = {
    "header": Key(read_header, _text("The header that holds the address.")),
    "field": Key(read_field, _text("The field of the JSON body that holds the address.")),
    "hosts": Key(
        read_hosts,
        {**_TEXTS, "description": "The hosts that it may have; * stands for one label. A path alone is the first's."},
        is_required=True,
    ),
    "path": Key(read_path, {**_text("What its path starts with."), "default": "/"}, default="/"),
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
    "header": Key(read_headers, _HEADERS),
    "query": Key(read_parameter, _text("The query parameter that holds the signature.")),
    "field": Key(read_field, _text("The field of the JSON body that holds the signature.")),
    "form": Key(read_parameter, _text("The parameter of the form that holds the signature.")),
}
_SIGNATURE: Mapping[str, Key] = {
    **_LOCATION,
    "encoding": _choice(ENCODINGS, "hex", "How the signature is written."),
    "separator": Key(read_ascii, _text("What stands between several elements in the header.")),
    "prefix": Key(read_ascii, _text("What a signature starts with; other elements are ignored."), default=b""),
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
    "id_header": Key(read_header, _text("A header that identifies the event, {id} in the signed string.")),
    "signed": Key(
        read_signed,
        {**_text(f"The signed string: {EXPECTED.partition(' with ')[2]}."), "default": "{body}"},
        default=SignedString((BODY,)),
    ),
    "tolerance": TOLERANCE,
}
_NAMED_SECRETS = {**_secrets_schema(_NAMED_KEYS), "description": "The keys; any will do, or that of the keyid."}
_KEY_SET = Key(
    read_https,
    {
        **_text("The https address of the sender's keys (JWKS), fetched when they are needed."),
        "pattern": "^https://",
    },
)
PLAID_HOSTS = {"production": "production.plaid.com", "sandbox": "sandbox.plaid.com"}
_LOCATIONS = ("header", "query", "field", "form")
CHOICES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "hmac": (_LOCATIONS,),
    "hash": (_LOCATIONS,),
    "public-key": (_LOCATIONS, ("public_keys", "key_url")),
    "token": (_LOCATIONS[:-1],),
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
            one_of(PUBLIC_KEY_ALGORITHMS),
            {"enum": list(PUBLIC_KEY_ALGORITHMS), "description": "The algorithm of the signature."},
            is_required=True,
        ),
        "public_keys": PUBLIC_KEYS,
        "key_url": KEY_URL,
        "recipient": Key(
            _read_recipient,
            {
                "type": "object",
                "properties": {name: dict(key.schema) for name, key in _RECIPIENT_KEYS.items()},
                "required": list(_RECIPIENT_KEYS),
                "additionalProperties": False,
                "description": "The field of the JSON body that names whom the request is for, and what it has to be.",
            },
        ),
    },
    "token": {
        "header": Key(read_header, _text("The header that holds the token.")),
        "query": Key(read_parameter, _text("The query parameter that holds the token.")),
        "field": Key(read_fields, _text("The field of the JSON body that holds the token; * is each item of a list.")),
        "prefix": Key(read_ascii, _text("What stands before the token in the header.")),
        "secrets": SECRETS,
    },
    "jwt": {
        "header": Key(read_header, _text("The header that holds the token."), default="Authorization"),
        "algorithms": Key(
            read_algorithms,
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
            read_claims,
            {
                "type": "object",
                "additionalProperties": {"type": ["string", "boolean"]},
                "description": "Claims, and what each has to be: a string, a template such as {body:sha256}, or true.",
            },
            default=(),
        ),
        "tolerance": TOLERANCE,
        "key_set": _KEY_SET,
        "secrets": SECRETS._replace(is_required=False),
        "public_keys": PUBLIC_KEYS._replace(is_required=False),
    },
    "http-message-signature": {
        "algorithm": Key(
            one_of(MESSAGE_ALGORITHMS),
            {"enum": list(MESSAGE_ALGORITHMS), "description": "The algorithm of the signature."},
            is_required=True,
        ),
        "secrets": Key(_list_of("secrets", may_expire=True, may_have_id=True), _NAMED_SECRETS),
        "secret_encoding": _choice(SECRET_ENCODINGS, "raw", "How the secrets are written."),
        "public_keys": Key(_list_of("public keys", may_expire=True, may_have_id=True), _NAMED_SECRETS),
        "key_set": _KEY_SET,
        "covered": Key(
            read_covered,
            {
                **_TEXTS,
                "maxItems": MAX_COMPONENTS,
                "description": "What a signature must cover beside the body: @method and @target-uri by default.",
            },
        ),
        "tag": Key(read_tag, _text("The tag of the signatures that count.")),
        "tolerance": TOLERANCE,
    },
    "basic": {
        "username": Key(read_username, _text("The user's name."), is_required=True),
        "secrets": SECRETS._replace(schema={**SECRETS.schema, "description": "The user's passwords; any will do."}),
    },
    "bearer": {"secrets": SECRETS},
    "none": {},
}
GENERIC: Mapping[str, Mapping[str, Key]] = {
    scheme: {**keys, "handshake": HANDSHAKE, "verify_tokens": VERIFY_TOKENS} for scheme, keys in _SCHEMES.items()
}
OF_PRESETS: Mapping[str, Mapping[str, Key]] = {
    "plaid-token": {
        "client_id": Key(read_given, _text("The client_id of the account's API keys."), is_required=True),
        "api_secret": Key(
            read_text,
            _text("The secret of its API keys, with which verification keys are asked for."),
            is_required=True,
        ),
        "environment": _choice(PLAID_HOSTS, "production", "The environment that the secret is of."),
    },
    "sns-message": {
        "topics": Key(
            _read_topics, {**_TEXTS, "description": "The ARNs of the topics that may send."}, is_required=True
        ),
        "tolerance": TOLERANCE,
    },
}
"""Schemes of a provider's file alone, with the keys that its user gives."""
SCHEMES: Mapping[str, Mapping[str, Key]] = {**GENERIC, **OF_PRESETS}
NAMED: Mapping[str, Key] = {name: SCHEMES["http-message-signature"][name] for name in ("secrets", "public_keys")}
"""Lists of which an item may have the id by which its sender calls it."""
