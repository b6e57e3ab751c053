"""Presets: how each provider signs, identifies and repeats its events; a YAML file for each, read when it is used.

A file has the keys that `providers:` in the rules has, too:

    title       the provider's name
    docs        the address of its documentation; or a list of them
    verify      the keys of a source's `verify:` but for its secrets, `scheme: hmac` by default; or a list of such
                mappings, any of which will do. One that has `secret_prefix` gets the secrets that start so, and the
                others then get the rest; one that has `id` says where the identity is of what is signed by it.
                `public_keys` are here if they are the same for everybody; a source may name others
    id, type    CEL: what identifies an event, and what kind it is. No `id` where the provider sends nothing that is
                certain to differ between two events: a wrong identity loses events, a missing one only repeats them.
                The type is a signed one if the provider says it there at all: THREAT_MODEL.md names the others
    no_id       why there is no `id`, if the provider's documents or its source say that it sends none that would do.
                With neither, it isn't confirmed whether it does
    dedupe      for how long a repeated event is a duplicate, where a source doesn't say: an hour, for a provider that
                repeats by itself what wasn't answered in time. None where an identity comes again only because someone
                asked for it, as by GitHub's "Redeliver" and GitLab's "Resend Request"
    asks        further keys that a source gives, each with what it is; `{given:NAME}` in `signed`, `prefix` and
                `recipient` stands for one
    sends       headers beside the signature that the provider sends, for signing test events
    handshake   the name of one in handshakes.py
    split       `body` or `body.PATH`: the list of events in a body; `id` and `type` are then of one of them
    batch_type  the media type of the requests that are split, if others are one event whatever their body is
    respond     {status: 200}, and a body where it matters (a text, or a mapping for JSON): what it takes for a success,
                if 202 isn't
    like        another preset, whose keys count where this one has none

    secret      what to enter as the source's `secrets`
    setup       what to click at the vendor
    deadline    how long the vendor waits for the response, as it says
    retries     how it repeats what wasn't answered in time, as it says
    evidence    what its signatures were compared with: {sdk: …}, {vector: …}, or `unconfirmed`; of a credential, where
                nothing is signed, {documents: …}
    notes       what else there is to know

Where a provider signs a timestamp, `tolerance` is the one of its documents or SDK.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml
from typing_extensions import override

from gateway.model import STORED_STATUSES, RulesError
from gateway.text import did_you_mean, kind_of, parse_duration
from gateway.verify.config_keys import OF_PRESETS, SCHEMES, refuse_ambiguous, refuse_uncovered
from gateway.verify.config_reader import ConfigPath, Path, read_keys
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.signed_string import SignedString
from gateway.verify.tokens import TOKEN


class SchemeError(RulesError):
    """A source's `verify:` is at fault. `problems` has all of them: the path below `verify`, and the message."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, ('verify', *path)))}: {text}" for path, text in problems))
        self.problems = tuple(problems)


class SigningMethod(NamedTuple):
    """One signing method of a scheme: a generic scheme with its keys' values, in a preset without the secrets.

    `secret_prefix` is that of the secrets that it uses. `id` is where its identity is, if not where the preset says.
    """

    scheme: str
    values: Mapping[str, Any]
    secret_prefix: str | None = None
    id: str | None = None

    @property
    def needs_url(self) -> bool:
        """Return whether the address that the sender was given is signed."""
        if self.scheme == "http-message-signature":
            return True
        templates = [template for _, template in self.values.get("claims", ())]
        return any(
            each.has("url") for each in (*templates, self.values.get("signed")) if isinstance(each, SignedString)
        )


class PresetResponse(NamedTuple):
    """What a provider has to get for an event that is stored; a body of None is ours, one that is no text is JSON."""

    status: int = 202
    body: str | Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A provider: its signing methods, and where its events have their identity and type.

    `about` is what people need to know of it, by the keys of its file.
    """

    methods: tuple[SigningMethod, ...]
    id: str | None = None
    type: str | None = None
    asks: tuple[tuple[str, str], ...] = ()
    sends: tuple[tuple[str, str], ...] = ()
    handshake: str | None = None
    dedupe: float | None = None
    response: PresetResponse | None = None
    split: tuple[str, ...] | None = None
    batch_type: str | None = None
    about: Mapping[str, Any]

    @property
    def has_timestamp(self) -> bool:
        return any("timestamp" in method.values for method in self.methods)

    @property
    def needs_url(self) -> bool:
        """Return whether the address that the sender was given is signed."""
        return any(method.needs_url for method in self.methods)

    def with_secrets(self, given: Mapping[str, Any]) -> list[SigningMethod]:
        """Return the signing methods with what the user gave: secrets, public keys, tolerance, and what is asked."""
        marks = tuple([method.secret_prefix for method in self.methods if method.secret_prefix])
        methods = []
        for method in self.methods:
            own: dict[str, Any] = {}
            if "secrets" in SCHEMES[method.scheme]:
                own["secrets"] = [
                    secret
                    for secret in given.get("secrets", ())
                    if (
                        secret.text.startswith(method.secret_prefix)
                        if method.secret_prefix
                        else not secret.text.startswith(marks)
                    )
                ]
            if "public_keys" in SCHEMES[method.scheme] and "public_keys" in given:
                own["public_keys"] = given["public_keys"]
            if self.asks and "signed" in method.values:
                own["signed"] = method.values["signed"].with_given(given)
            own |= self._with_given(method, given)
            if self.asks and "claims" in method.values:
                own["claims"] = tuple(
                    [
                        (name, each.with_given(given) if isinstance(each, SignedString) else each)
                        for name, each in method.values["claims"]
                    ]
                )
            own |= {name: given[name] for name in OF_PRESETS.get(method.scheme, ()) if name in given}
            if "tolerance" in given and "timestamp" in method.values:
                own["tolerance"] = given["tolerance"]
            methods.append(method._replace(values={**method.values, **own}))
        return methods

    def _with_given(self, method: SigningMethod, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a signature's prefix and a request's recipient with what is asked in them."""
        own: dict[str, Any] = {}
        for name, _ in self.asks:
            mark, value = f"{{given:{name}}}", str(given.get(name, ""))
            if mark.encode() in method.values.get("prefix", b""):
                own["prefix"] = method.values["prefix"].replace(mark.encode(), value.encode())
            if method.values.get("recipient", {}).get("is") == mark:
                own["recipient"] = {**method.values["recipient"], "is": value}
        return own


UNCONFIRMED = "unconfirmed"
_MEDIA_TYPE = re.compile(rf"{TOKEN.pattern}/{TOKEN.pattern}")
_CEL = ("id", "type")
_ABOUT = ("title", "docs", "no_id", "secret", "setup", "deadline", "retries", "evidence", "notes")
_OF_USERS = ("secrets", "handshake", "verify_tokens")
KEYS = ("verify", *_CEL, "dedupe", "asks", "sends", "handshake", "respond", "split", "batch_type", "like", *_ABOUT)


def read_preset(entry: Mapping[Any, object], where: ConfigPath) -> Preset | None:
    """Parse a preset; problems are reported, and None is returned if one is essential."""
    own = _with_base(entry, where)
    if own is None:
        return None
    entry = own
    for name in entry:
        if name not in KEYS:
            where.below(str(name)).report(f"unknown key {str(name)!r}{did_you_mean(str(name), KEYS)}")
    for name in (*_CEL, "handshake"):
        if name in entry and not isinstance(entry[name], str):
            where.below(name).report(f"expected a string, got {kind_of(entry[name])}")
            return None
    if {"id", "no_id"} <= entry.keys():
        where.below("no_id").report("expected no key 'id' beside it, got one")
    if (handshake := entry.get("handshake")) is not None and handshake not in HANDSHAKES:
        where.below("handshake").report(f"expected one of {', '.join(HANDSHAKES)}, got {handshake!r}")
        return None
    sends = _texts(entry.get("sends", {}), "headers", where.below("sends"))
    asks = _texts(entry.get("asks", {}), "keys", where.below("asks"))
    if (
        isinstance(handshake, str)
        and asks is not None
        and (missing := {*HANDSHAKES[handshake].required_keys} - {*dict(asks)})
    ):
        where.below("asks").report(f"expected {', '.join(missing)} with this handshake, got none")
    methods = _signing_methods(entry.get("verify"), where.below("verify"))
    if methods is None or sends is None or asks is None:
        return None
    values: dict[str, Any] = {name: entry[name] for name in (*_CEL, "handshake") if name in entry}
    return Preset(
        methods=methods,
        asks=asks,
        sends=sends,
        dedupe=_dedupe(entry.get("dedupe"), where.below("dedupe")),
        response=_response(entry.get("respond"), where.below("respond")),
        split=_split(entry.get("split"), where.below("split")),
        batch_type=_batch_type(entry, where.below("batch_type")),
        about={name: entry[name] for name in _ABOUT if name in entry},
        **values,
    )


def _with_base(entry: Mapping[Any, object], where: ConfigPath) -> dict[Any, object] | None:
    """Return the keys of a preset, and those of the one that it is `like`; None, reported, if that isn't known."""
    if (base := entry.get("like")) is None:
        return dict(entry)
    if base not in PRESETS:
        where.below("like").report(f"expected a provider's name, got {base!r}{did_you_mean(str(base), PRESETS)}")
        return None
    inherited = dict(_entry(str(base)))
    if "split" in entry:
        inherited.pop("batch_type", None)  # that of another list
    if "id" in entry:
        inherited.pop("no_id", None)
    return {**inherited, **entry}


def _texts(value: object, what: str, where: ConfigPath) -> tuple[tuple[str, str], ...] | None:
    if isinstance(value, Mapping) and all(isinstance(each, str) for pair in value.items() for each in pair):
        return tuple(value.items())
    where.report(f"expected a mapping of {what} to strings, got something else")
    return None


def _response(value: object, where: ConfigPath) -> PresetResponse | None:
    match value:
        case None:
            return None
        case {"status": int(status), **rest} if status in STORED_STATUSES and rest.keys() <= {"body"}:
            body = rest.get("body")
            if body is None or isinstance(body, str | dict):
                return PresetResponse(status, body)
    statuses = ", ".join(map(str, STORED_STATUSES))
    where.report(f"expected a mapping with a status of {statuses}, and perhaps a body, got something else")
    return None


def _split(value: object, where: ConfigPath) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"body(\.[A-Za-z_$][\w$-]*)*", value):
        return tuple(value.split(".")[1:])
    where.report(f"expected body or body.PATH, got {value!r}")
    return None


def _batch_type(entry: Mapping[Any, object], where: ConfigPath) -> str | None:
    value = entry.get("batch_type")
    if value is None:
        return None
    if "split" not in entry:
        where.report("expected the key 'split' beside it, got none")
    if isinstance(value, str) and _MEDIA_TYPE.fullmatch(value):
        return value.lower()
    where.report(f"expected a media type such as application/json, got {value!r}")
    return None


def _dedupe(value: object, where: ConfigPath) -> float | None:
    try:
        return None if value is None else parse_duration(str(value))
    except ValueError:
        where.report(f"expected a duration such as 1h, got {value!r}")
        return None


def _signing_methods(value: object, where: ConfigPath) -> tuple[SigningMethod, ...] | None:
    if not isinstance(value, Mapping | list) or not value:
        where.report(f"expected the signing method, or a list of them, got {kind_of(value)}")
        return None
    methods = []
    for index, config in enumerate(value if isinstance(value, list) else [value]):
        here = where.below(index) if isinstance(value, list) else where
        if not isinstance(config, Mapping):
            here.report(f"expected a mapping, got {kind_of(config)}")
            return None
        scheme = config.get("scheme", "hmac")
        if scheme not in SCHEMES:
            here.below("scheme").report(f"expected one of {', '.join(SCHEMES)}, got {scheme!r}")
            return None
        of_user = {*_OF_USERS, *OF_PRESETS.get(scheme, ())}
        keys = {name: key for name, key in SCHEMES[scheme].items() if name not in of_user}
        bare = {name: each for name, each in config.items() if name not in {"secret_prefix", "id"}}
        if scheme == "none" and len(value) > 1 and isinstance(value, list):
            here.below("scheme").report("expected none alone, since it accepts what others refuse, got others, too")
        values = read_keys(bare, keys, here)
        refuse_uncovered(values, here)
        refuse_ambiguous(values, here)
        methods.append(SigningMethod(scheme, values, config.get("secret_prefix"), config.get("id")))
    return tuple(methods)


_DESCRIPTIONS = {
    "id": "CEL: what identifies an event.",
    "type": "CEL: the event's type.",
    "dedupe": "For how long a repeated event is a duplicate, where a source doesn't say.",
    "like": "A preset, whose keys count where this one has none.",
    "title": "The provider's name.",
    "no_id": "Why nothing that the provider sends identifies an event, if that is documented.",
    "secret": "What to enter as the source's `secrets`.",
    "setup": "What to click at the vendor.",
    "deadline": "How long the vendor waits for the response.",
    "retries": "How it repeats what wasn't answered in time.",
    "notes": "What else there is to know.",
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a preset, for editors: only roughly of `verify`, which depends on its scheme."""
    text = {"type": "string", "minLength": 1}
    method = {"type": "object", "properties": {"scheme": {"enum": list(SCHEMES)}}}
    methods = {"anyOf": [method, {"type": "array", "items": method, "minItems": 1}]}
    return {
        "type": "object",
        "description": "How a provider signs, identifies and repeats its events.",
        "properties": {
            **{name: {**text, "description": description} for name, description in _DESCRIPTIONS.items()},
            "docs": {
                "anyOf": [text, {"type": "array", "items": text}],
                "description": "The address of its documentation, or several.",
            },
            "evidence": {
                "anyOf": [text, {"type": "object"}],
                "description": "What its signatures were compared with.",
            },
            "handshake": {"enum": list(HANDSHAKES), "description": "The handshake that is answered."},
            "asks": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "Further keys that a source gives, each with what it is.",
            },
            "respond": {
                "type": "object",
                "properties": {"status": {"enum": list(STORED_STATUSES)}, "body": {"type": ["string", "object"]}},
                "required": ["status"],
                "additionalProperties": False,
                "description": "The response for an event that is stored, where a source doesn't say.",
            },
            "split": {**text, "description": "The list in a body of which each item is an event: body or body.PATH."},
            "batch_type": {**text, "description": "The media type of the requests that are split; default: any."},
            "sends": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "Headers beside the signature, for test events.",
            },
            "verify": {
                **methods,
                "description": "The keys of a source's `verify`, but for the secrets; or a list of such.",
            },
        },
        "additionalProperties": False,
        "anyOf": [{"required": ["verify"]}, {"required": ["like"]}],
    }


class _Presets(Mapping[str, Preset]):
    """The presets, by the name that is written under `scheme`."""

    @override
    def __getitem__(self, name: str) -> Preset:
        if name not in self:
            raise KeyError(name)
        return _load(name)

    @override
    def __contains__(self, name: object) -> bool:
        return name in _names()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(_names())

    @override
    def __len__(self) -> int:
        return len(_names())


PRESETS: Mapping[str, Preset] = _Presets()


@cache
def _names() -> tuple[str, ...]:
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


@cache
def _load(name: str) -> Preset:
    problems: dict[tuple[Path, str], None] = {}
    preset = read_preset(_entry(name), ConfigPath((name,), problems))
    if problems or preset is None:
        raise SchemeError(list(problems))
    return preset


@cache
def _entry(name: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = yaml.safe_load(resources.files(__name__).joinpath(f"{name}.yaml").read_text("utf-8"))
    return entry
