"""Presets: how each provider signs, identifies and repeats its events; a YAML file for each, read when it is used.

A file has the keys that `providers:` in the rules has, too:

    title       the provider's name
    docs        the address of its documentation; or a list of them
    verify      the keys of a source's `verify:` but for its secrets, `scheme: hmac` by default; or a list of such
                mappings, any of which will do. One that has `secret_prefix` gets the secrets that start so, and the
                others then get the rest; one that has `id` says where the identity is of what is signed by it.
                Instead of secrets a source gives `public_keys`, where the algorithm is of these; they are here if they
                are the same for everybody, and a source may then name others
    id, type    CEL: what identifies an event, and what kind it is; without an `id`, a signed `id_header` identifies
                it. None where the provider sends nothing that is certain to differ between two events: a wrong identity
                loses events, a missing one only repeats them. The type is a signed one if the provider says it there at
                all: THREAT_MODEL.md names the others
    no_id       why there is no `id`, if the provider's documents or its source say that it sends none that would do.
                With neither, it isn't confirmed whether it does
    dedupe      for how long a repeated event is a duplicate, where a source doesn't say: an hour, for a provider that
                repeats by itself what wasn't answered in time. None where an identity comes again only because someone
                asked for it, as by GitHub's "Redeliver" and GitLab's "Resend Request"
    asks        further keys that a source gives, each with what it is; `{given:NAME}` in `signed`, `prefix`, `claims`
                and `recipient` stands for one
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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from typing_extensions import override

from gateway.model import RulesError
from gateway.text import did_you_mean, kind_of, shown
from gateway.verify.config_keys import OF_PRESETS, SCHEMES
from gateway.verify.config_reader import ConfigPath, Path, read_keys
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.preset_keys import ABOUT, KEYS, METHOD_KEYS, PresetResponse
from gateway.verify.signed_string import SignedString
from gateway.verify.signing_methods import SigningMethod, identity_of, proofs, read_method, recipient


class SchemeError(RulesError):
    """A source's `verify:` is at fault. `problems` has all of them: the path below `verify`, and the message."""

    def __init__(self, problems: Sequence[tuple[Path, str]]) -> None:
        super().__init__("\n".join(f"{'.'.join(map(str, ('verify', *path)))}: {text}" for path, text in problems))
        self.problems = tuple(problems)


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

    def with_given(self, given: Mapping[str, Any]) -> list[SigningMethod]:
        """Return the signing methods with what the user gave: secrets, public keys, tolerance, and what is asked."""
        marks = tuple([method.secret_prefix for method in self.methods if method.secret_prefix])
        methods = []
        for method in self.methods:
            own = self._with_asked(method, given)
            if method.proof == "secrets":
                own["secrets"] = [
                    secret
                    for secret in given.get("secrets", ())
                    if (
                        secret.text.startswith(method.secret_prefix)
                        if method.secret_prefix
                        else not secret.text.startswith(marks)
                    )
                ]
            if method.proof == "public_keys" and "public_keys" in given:
                own["public_keys"] = given["public_keys"]
            own |= {name: given[name] for name in OF_PRESETS.get(method.scheme, ()) if name in given}
            if "tolerance" in given and "timestamp" in method.values:
                own["tolerance"] = given["tolerance"]
            methods.append(method._replace(values={**method.values, **own}))
        return methods

    def _with_asked(self, method: SigningMethod, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a method in which something is that is asked, with it."""
        own: dict[str, Any] = {}
        if not self.asks:
            return own
        if "signed" in method.values:
            own["signed"] = method.values["signed"].with_given(given)
        if "claims" in method.values:
            own["claims"] = tuple(
                [
                    (name, each.with_given(given) if isinstance(each, SignedString) else each)
                    for name, each in method.values["claims"]
                ]
            )
        prefix, named = method.values.get("prefix", b""), recipient(method.values)
        for name, _ in self.asks:
            mark, value = f"{{given:{name}}}", str(given.get(name, ""))
            prefix = prefix.replace(mark.encode(), value.encode())
            named = {**named, "is": named["is"].replace(mark, value)} if "is" in named else named
        if "prefix" in method.values:
            own["prefix"] = prefix
        if named:
            own["recipient"] = named
        return own


UNCONFIRMED = "unconfirmed"
_OF_USERS = ("secrets", "handshake", "verify_tokens")


def read_preset(entry: Mapping[Any, object], where: ConfigPath) -> Preset | None:
    """Parse a preset; problems are reported, and None is returned if one is essential."""
    own = _with_base(entry, where)
    if own is None:
        return None
    values = read_keys(own, KEYS, where)
    if {"id", "no_id"} <= own.keys():
        where.below("no_id").report("expected no key 'id' beside it, got one")
    if "batch_type" in own and "split" not in own:
        where.below("batch_type").report("expected the key 'split' beside it, got none")
    asks = values.get("asks", ())
    names = [name for name, _ in asks]
    methods = _signing_methods(own.get("verify"), where.below("verify"), names, has_identity="id" in own)
    if methods is None:
        return None
    if (handshake := values.get("handshake")) is not None:
        _refuse_unfit_handshake(handshake, methods, asks, where)
    of_methods = {name for method in methods for name in OF_PRESETS.get(method.scheme, ())}
    for name in names:
        if name in of_methods:
            where.below("asks").below(name).report(f"expected a key that a source doesn't have anyway, got {name!r}")
    return Preset(
        methods=methods,
        about={name: values[name] for name in ABOUT if name in values},
        response=values.get("respond"),
        **{name: values[name] for name in _FIELDS if name in values},
    )


_FIELDS = ("id", "type", "dedupe", "asks", "sends", "handshake", "split", "batch_type")


def _refuse_unfit_handshake(
    name: str, methods: Sequence[SigningMethod], asks: Sequence[tuple[str, str]], where: ConfigPath
) -> None:
    """Report what a handshake needs of a provider and hasn't."""
    handshake = HANDSHAKES[name]
    if missing := {*handshake.required_keys} - {*dict(asks)}:
        where.below("asks").report(f"expected {', '.join(missing)} with this handshake, got none")
    # While its token isn't known, a signature is recognised by its header, and later verified by the token.
    if handshake.shows_token and not (
        len(methods) == 1 and methods[0].proof == "secrets" and len(methods[0].signature_headers) == 1
    ):
        expected = "expected one signing method, by secrets and with its signatures in one header, with this handshake"
        where.below("handshake").report(f"{expected}, got something else")


def _with_base(entry: Mapping[Any, object], where: ConfigPath) -> dict[Any, object] | None:
    """Return the keys of a preset, and those of the one that it is `like`; None, reported, if that isn't known."""
    if (base := entry.get("like")) is None:
        return dict(entry)
    if not isinstance(base, str) or base not in PRESETS:
        hint = did_you_mean(base, PRESETS) if isinstance(base, str) else ""
        where.below("like").report(f"expected a provider's name, got {shown(base)}{hint}")
        return None
    if (inherited := _with_base(_entry(base), where)) is None:
        return None
    if "split" in entry:
        inherited.pop("batch_type", None)  # that of another list
    if "id" in entry:
        inherited.pop("no_id", None)
    return {**inherited, **entry}


def _signing_methods(
    value: object, where: ConfigPath, asks: Sequence[str], *, has_identity: bool
) -> tuple[SigningMethod, ...] | None:
    """Parse a method, or a list of them; None, reported, if one has no known scheme.

    Without an identity of the provider (`has_identity`), that of a method is in its `id_header`.
    """
    if not isinstance(value, Mapping | list) or not value:
        where.report(f"expected the signing method, or a list of them, got {kind_of(value)}")
        return None
    many = isinstance(value, list) and len(value) > 1
    methods = []
    for index, config in enumerate(value if isinstance(value, list) else [value]):
        here = where.below(index) if isinstance(value, list) else where
        if not isinstance(config, Mapping):
            here.report(f"expected a mapping, got {kind_of(config)}")
            return None
        scheme = config.get("scheme", "hmac")
        if not isinstance(scheme, str) or scheme not in SCHEMES:
            here.below("scheme").report(f"expected one of {', '.join(SCHEMES)}, got {shown(scheme)}")
            return None
        if scheme == "none" and many:
            here.below("scheme").report("expected none alone, since it accepts what others refuse, got others, too")
        methods.append(_signing_method(config, scheme, here, asks, has_identity=has_identity))
    return tuple(methods)


def _signing_method(
    config: Mapping[Any, object], scheme: str, where: ConfigPath, asks: Sequence[str], *, has_identity: bool
) -> SigningMethod:
    of_user = {*_OF_USERS, *OF_PRESETS.get(scheme, ())}
    keys = {name: key for name, key in SCHEMES[scheme].items() if name not in of_user}
    bare = {name: each for name, each in config.items() if name not in METHOD_KEYS}
    values = read_method(bare, scheme, keys, where, asks=asks)
    own = read_keys({name: each for name, each in config.items() if name in METHOD_KEYS}, METHOD_KEYS, where)
    if "secret_prefix" in own and "secrets" not in proofs(scheme, values):
        where.below("secret_prefix").report("expected no 'secret_prefix' of what is verified without secrets, got one")
    identity = own.get("id") or (None if has_identity else identity_of(values))
    return SigningMethod(scheme, values, own.get("secret_prefix"), identity)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a preset, for editors: only roughly of `verify`, which depends on its scheme."""
    return {
        "type": "object",
        "description": "How a provider signs, identifies and repeats its events.",
        "properties": {name: dict(key.schema) for name, key in KEYS.items()},
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
