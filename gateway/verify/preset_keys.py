"""The keys of a provider, in its file or under `providers:`: how each is parsed, and its JSON Schema."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gateway.model import STORED_STATUSES
from gateway.text import UNSENDABLE, shown
from gateway.verify.config_keys import SCHEMES
from gateway.verify.config_reader import ConfigPath, InvalidValueError, Key
from gateway.verify.config_values import EXPECTED_WINDOW, SPLIT, WINDOW, one_of, parse_window
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.tokens import PARAMETER, TOKEN

OF_SOURCES = frozenset({"scheme", "secrets", "public_keys", "tolerance", "verify_tokens", "pending"})
"""What a source may have beside what a provider asks for."""
_MEDIA_TYPE = re.compile(rf"{TOKEN.pattern}/{TOKEN.pattern}")


class PresetResponse(NamedTuple):
    """What a provider has to get for an event that is stored; a body of None is ours, one that is no text is JSON."""

    status: int = 202
    body: str | Mapping[str, Any] | None = None


def _text_of(expected: str) -> Callable[[object, ConfigPath], str]:
    def read(value: object, _: ConfigPath) -> str:
        if isinstance(value, str) and value.strip():
            return value
        raise InvalidValueError(expected, value)

    return read


_read_text = _text_of("a non-empty string")


def _read_texts(value: object, where: ConfigPath) -> str | tuple[str, ...]:
    if not isinstance(value, list):
        return _read_text(value, where)
    return tuple([text for index, each in enumerate(value) if (text := _read(_read_text, each, where.below(index)))])


def _read_evidence(value: object, where: ConfigPath) -> str | Mapping[str, str]:
    return _read_pairs(value, where) if isinstance(value, Mapping) else _read_text(value, where)


def _read_pairs(value: Mapping[Any, object], where: ConfigPath) -> Mapping[str, str]:
    read = {str(name): _read(_read_text, each, where.below(str(name))) for name, each in value.items()}
    return {name: text for name, text in read.items() if text is not None}


def _read(read: Callable[[object, ConfigPath], str], value: object, where: ConfigPath) -> str | None:
    """Parse a value below a key; None, reported, if it isn't what is expected."""
    try:
        return read(value, where)
    except InvalidValueError as error:
        where.report(str(error))
        return None


def _read_window(value: object, _: ConfigPath) -> float | None:
    try:
        return parse_window(value)
    except ValueError:
        raise InvalidValueError(EXPECTED_WINDOW, value) from None


def _read_asks(value: object, where: ConfigPath) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping of keys to strings", value)
    for name in value:
        if not isinstance(name, str) or not PARAMETER.fullmatch(name):
            expected = "expected a key's name of letters, digits and ._~-"
            where.below(str(name)).report(f"{expected}, got {shown(name)}")
        elif name in OF_SOURCES:
            where.below(name).report(f"expected a key that a source doesn't have anyway, got {name!r}")
    return tuple(_read_pairs(value, where).items())


def _read_sends(value: object, where: ConfigPath) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise InvalidValueError("a mapping of headers to strings", value)
    for name, text in value.items():
        here = where.below(str(name))
        if not isinstance(name, str) or not TOKEN.fullmatch(name):
            here.report(f"expected a header's name, got {shown(name)}")
        if isinstance(text, str) and UNSENDABLE.search(text):
            here.report("expected a header value without control characters, got one with them")
    return tuple(_read_pairs(value, where).items())


def _read_split(value: object, _: ConfigPath) -> tuple[str, ...] | None:
    if isinstance(value, str) and SPLIT.fullmatch(value):
        return None if value == "off" else tuple(value.split(".")[1:])
    raise InvalidValueError("body, body.PATH or off", value)


def _read_media_type(value: object, _: ConfigPath) -> str:
    if isinstance(value, str) and _MEDIA_TYPE.fullmatch(value):
        return value.lower()
    raise InvalidValueError("a media type such as application/json", value)


def _read_response(value: object, _: ConfigPath) -> PresetResponse:
    match value:
        case {"status": int(status), **rest} if status in STORED_STATUSES and rest.keys() <= {"body"}:
            if not rest:
                return PresetResponse(status)
            if isinstance(body := rest["body"], str | dict):
                return PresetResponse(status, body)
    statuses = ", ".join(map(str, STORED_STATUSES))
    raise InvalidValueError(f"a mapping with a status of {statuses}, and perhaps a body", value)


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_METHOD = {"type": "object", "properties": {"scheme": {"enum": list(SCHEMES)}}}


def _text(description: str) -> Key:
    return Key(_read_text, {**_TEXT, "description": description})


def _cel(description: str) -> Key:
    return Key(_text_of("a CEL expression"), {**_TEXT, "description": description})


ABOUT: Mapping[str, Key] = {
    "title": _text("The provider's name."),
    "docs": Key(
        _read_texts,
        {
            "anyOf": [_TEXT, {"type": "array", "items": _TEXT}],
            "description": "The address of its documentation, or several.",
        },
    ),
    "no_id": _text("Why nothing that the provider sends identifies an event, if that is documented."),
    "secret": _text("What to enter as the source's `secrets`."),
    "setup": _text("What to click at the vendor."),
    "deadline": _text("How long the vendor waits for the response."),
    "retries": _text("How it repeats what wasn't answered in time."),
    "evidence": Key(
        _read_evidence, {"anyOf": [_TEXT, _TEXTS], "description": "What its signatures were compared with."}
    ),
    "notes": _text("What else there is to know."),
}
"""What people need to know of a provider."""
KEYS: Mapping[str, Key] = {
    "verify": Key(
        lambda value, _: value,  # read by its methods
        {
            "anyOf": [_METHOD, {"type": "array", "items": _METHOD, "minItems": 1}],
            "description": "The keys of a source's `verify`, but for the secrets; or a list of such.",
        },
    ),
    "id": _cel("CEL: what identifies an event."),
    "type": _cel("CEL: the event's type."),
    "dedupe": Key(
        _read_window,
        {**WINDOW, "description": "For how long a repeated event is a duplicate, where a source doesn't say; or off."},
    ),
    "asks": Key(
        _read_asks, {**_TEXTS, "description": "Further keys that a source gives, each with what it is."}, default=()
    ),
    "sends": Key(_read_sends, {**_TEXTS, "description": "Headers beside the signature, for test events."}, default=()),
    "handshake": Key(one_of(HANDSHAKES), {"enum": list(HANDSHAKES), "description": "The handshake that is answered."}),
    "respond": Key(
        _read_response,
        {
            "type": "object",
            "properties": {"status": {"enum": list(STORED_STATUSES)}, "body": {"type": ["string", "object"]}},
            "required": ["status"],
            "additionalProperties": False,
            "description": "The response for an event that is stored, where a source doesn't say.",
        },
    ),
    "split": Key(
        _read_split,
        {
            "type": "string",
            "pattern": f"^({SPLIT.pattern})$",
            "description": "The list in a body of which each item is an event: body or body.PATH.",
        },
    ),
    "batch_type": Key(
        _read_media_type, {**_TEXT, "description": "The media type of the requests that are split; default: any."}
    ),
    "like": _text("A preset, whose keys count where this one has none."),
    **ABOUT,
}
METHOD_KEYS: Mapping[str, Key] = {
    "secret_prefix": Key(_read_text, _TEXT),
    "id": KEYS["id"],
}
"""What one method of a provider may have beside the keys of its scheme."""
