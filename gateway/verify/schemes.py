"""Builds a verifier from a source's `verify:`.

Nine schemes are generic (`hmac`, `hash`, `public-key`, `http-message-signature`, `jwt`, `token`, `basic`, `bearer`,
`none`); a preset is one of them, filled in by its file in `presets/`.

    verify:
      scheme: hmac
      header: X-Signature          where the signatures are: a header, a list of them, or X-Signature-{n}, numbered
                                   from 1; or query: NAME, field: PATH of the JSON body, or form: NAME
      algorithm: sha256            or sha1, sha512
      encoding: hex                or hex-upper, base64, base64url (without padding)
      separator: ","               between several elements in the header; without it the whole value is one
      prefix: v1=                  what a signature starts with; other elements are ignored
      timestamp: {prefix: t=}      an element of the same header, by what it starts with or as {position: 1}; or
                                   {header: X-Time}, or {field: PATH}; unit: s, ms or iso
      id_header: X-Id              a signed header that identifies the event
      signed: "{timestamp}.{body}" from {body} {timestamp} {id} {method} {path} {url} {header:NAME} {query:NAME}
                                   {body:sha256} {body:crc32} {form} (sorted) {field:PATH} {field:PATH?}; {{ is a brace
      body_digest: {query: NAME}   a signed query parameter that is the hexadecimal SHA-256 of the body; then {body} can
                                   be missing from `signed`
      tolerance: 5m                how far the timestamp may be from now, in both directions; or none
      secrets: ["..."]             any of them will do, for rotation; the first one signs test events. One may be
                                   {secret: "...", until: 2027-01-31}, or a time, after which it verifies nothing
      secret_encoding: raw         or hex, base64, whsec (base64 after `whsec_`), nfkd, sha1

      handshake: cloudevents       of handshakes.py, and verify_tokens: [...] for one that has a token

`scheme: hash` takes the same keys, but for `body_digest` and `secret_encoding`: a plain hash of a string with
`{secret}` in it.
`scheme: public-key` takes, instead of `secrets` and `secret_encoding`:

      algorithm: ed25519           or ecdsa-p256-sha256, rsa-sha256, rsa-sha1
      public_keys: ["..."]         any of them will do: PEM, or base64 without its lines; of Ed25519 also the 32 bytes
      key_url: {header: X-Key-URL, hosts: ["keys.example.com"], path: /v1/}   or the address of the key, fetched when
                                   it is needed: https, at one of the hosts (* is one label), a path that starts so
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.text import did_you_mean, shown
from gateway.verify.check_builder import LISTS, build_check, ring, secret_bytes
from gateway.verify.config_keys import (
    CHOICES,
    GENERIC,
    NAMED,
    OF_PRESETS,
    PENDING,
    PUBLIC_KEYS,
    SECRETS,
    TOLERANCE,
    VERIFY_TOKENS,
    asked_key,
)
from gateway.verify.config_reader import ConfigPath, Key, Path, read_keys
from gateway.verify.encodings import decode_secret
from gateway.verify.handshakes import HANDSHAKES, HandshakeKeys
from gateway.verify.key_ring import SecretLifetime
from gateway.verify.pending import PendingToken
from gateway.verify.presets import PRESETS, UNCONFIRMED, Preset, SchemeError
from gateway.verify.signed_string import SECRET
from gateway.verify.signing_methods import SigningMethod, identity_of, read_method
from gateway.verify.verifier import Verifier

WEAK = 16  # bytes: anybody who has seen one signed request can find a shorter key by trying
_NONE: Mapping[str, Preset] = {}
_PROOFS = ("secrets", "public_keys", "key_url", "key_set", "topics", "api_secret")
"""The keys of which a signing method needs one, to be checked."""
ALWAYS_CREDENTIALS = frozenset({b"authorization", b"cookie", b"proxy-authorization"})


class PartialSchemeError(SchemeError):
    """Some values of a source's `verify:` are at fault, but not what its events have their identity by.

    `verifier` is what it would be without these values: to see what becomes of events, and not to verify any.
    """

    def __init__(self, problems: Sequence[tuple[Path, str]], verifier: Verifier) -> None:
        super().__init__(problems)
        self.verifier = verifier


def build_verifier(
    config: Mapping[str, object], *, public_url: str | None = None, providers: Mapping[str, Preset] = _NONE
) -> Verifier:
    """Build the verifier of a source's `verify:`; `public_url` is the address that the sender was given, for `{url}`.

    `providers` are those that a scheme may name beside the presets. `public_url` has no query; if it has no path
    either, the request's is appended. Raises SchemeError, or PartialSchemeError, with every problem. No message repeats
    a secret.
    """
    problems: dict[tuple[Path, str], None] = {}
    verifier = _build(config, ConfigPath((), problems), public_url, providers)
    if verifier is None or any(path[:1] == ("id_header",) for path, _ in problems):
        raise SchemeError(list(problems))
    if problems:
        raise PartialSchemeError(list(problems), verifier)
    return verifier


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the `verify:` mapping."""
    return {
        "type": "object",
        "description": "Who may send to this source, and how that is verified.",
        "properties": {"scheme": {"enum": [*GENERIC, *PRESETS], "description": "A provider, or a generic scheme."}},
        "required": ["scheme"],
        "allOf": [
            {
                "if": {"properties": {"scheme": {"const": scheme}}, "required": ["scheme"]},
                "then": _keys_schema(scheme),
            }
            for scheme in (*GENERIC, *PRESETS)
        ],
    }


def user_keys(scheme: str, preset: Preset | None = None) -> Mapping[str, Key]:
    """Return the keys allowed with this scheme: for a preset, only those that the provider doesn't define."""
    if scheme in GENERIC:
        return GENERIC[scheme]
    preset = preset or PRESETS[scheme]
    keys: dict[str, Key] = {}
    for name, key in (("secrets", SECRETS), ("public_keys", PUBLIC_KEYS)):
        proven = [method for method in preset.methods if method.proof == name]
        if proven:  # a provider's own public key may be replaced, by that of its sandbox
            named = [NAMED[name] for method in proven if method.scheme == "http-message-signature"]
            is_known = all(name in method.values for method in proven)
            keys[name] = next(iter(named), key)._replace(is_required=not is_known)
    if preset.has_timestamp:
        keys["tolerance"] = TOLERANCE
    if preset.handshake and HANDSHAKES[preset.handshake].has_token:
        keys["verify_tokens"] = VERIFY_TOKENS
    if preset.handshake and HANDSHAKES[preset.handshake].shows_token:
        keys["secrets"], keys["pending"] = SECRETS._replace(is_required=False), PENDING
    for method in preset.methods:
        keys |= OF_PRESETS.get(method.scheme, {})
    return keys | {name: asked_key(what) for name, what in preset.asks}


def _keys_schema(scheme: str) -> dict[str, Any]:
    keys = user_keys(scheme)
    schema = {
        "properties": {"scheme": True, **{name: dict(key.schema) for name, key in keys.items()}},
        "required": [name for name, key in keys.items() if key.is_required],
        "additionalProperties": False,
    }
    if "pending" in keys:
        is_pending = {"properties": {"pending": {"const": True}, "secrets": False}, "required": ["pending"]}
        schema["oneOf"] = [{"required": ["secrets"]}, is_pending]
    if choices := CHOICES.get(scheme):
        schema["allOf"] = [{"oneOf": [{"required": [name]} for name in names]} for names in choices]
    return schema


_OF_SOURCE = ("public_url", "id", "type", "key", "dedupe", "split", "path", "respond", "limits", "quarantine")


def _build(
    config: Mapping[str, object], where: ConfigPath, public_url: str | None, providers: Mapping[str, Preset]
) -> Verifier | None:
    """Build the verifier; None or an incomplete one if there are problems."""
    scheme = config.get("scheme")
    if not isinstance(scheme, str):
        where.report(f"expected the key 'scheme' with a scheme's name, got {shown(scheme)}")
        return None
    known = providers.get(scheme) or PRESETS.get(scheme)
    if scheme not in GENERIC and known is None:
        generic = f", expected one of {', '.join(GENERIC)}, or a provider's name (`gateway providers` lists them)"
        hint = did_you_mean(scheme, (*GENERIC, *PRESETS, *providers)) or generic
        where.below("scheme").report(f"unknown scheme {shown(scheme)}{hint}")
        return None
    preset, given, methods = _read(scheme, known, config, where)
    if not public_url and any(method.needs_url for method in methods):
        message = "expected the source's public_url beside `verify`, since the address that the sender knows is signed"
        where.report(f"{message}, got none")
    # A signing method without secrets isn't checked, but the header that its senders use still carries a credential.
    tokens = [method.values for method in methods if method.scheme == "token"]
    used = [method for method in methods if method.scheme == "none" or any(method.values.get(name) for name in _PROOFS)]
    handshake = HANDSHAKES[preset.handshake] if preset.handshake else None
    challenge = None if handshake is None else handshake.signed_challenge
    if challenge is not None and any(method.scheme == "jwt" and "secrets" in method.values for method in methods):
        where.below("handshake" if known is None else "scheme").report(
            f"expected no handshake that signs challenges by the secrets of a token, got {preset.handshake}"
        )
    checks = [build_check(method, where, public_url, challenge) for method in used]
    ids = tuple([method.id or preset.id for method in used])
    if handshake is not None and handshake.shows_token:
        if given.get("pending"):
            [header] = methods[0].signature_headers
            checks.append(PendingToken(respond=handshake.respond, header=header))
            ids += (preset.id,)
        else:
            handshake = None
            if "secrets" not in config:
                where.report("expected the key 'secrets', or 'pending' until its token is known, got neither")
    return Verifier(
        scheme=scheme,
        id=ids[0] if len(set(ids)) == 1 else preset.id,
        ids=ids,
        type=preset.type,
        credential_headers=ALWAYS_CREDENTIALS
        | {values["header"].lower().encode() for values in tokens if "header" in values},
        credential_query=frozenset([values["query"] for values in tokens if "query" in values]),
        checks=tuple([check for check in checks if check is not None]),
        sends=preset.sends,
        respond_to_handshake=handshake,
        handshake_keys=HandshakeKeys(
            ring(given.get("secrets", ()), secret_bytes),
            tuple([secret_bytes(each) for each in given.get("verify_tokens", ())]),
            {name: given[name] for name, _ in preset.asks if name in given},
        ),
        lifetimes=tuple(
            [SecretLifetime(name, each.position, each.until) for name in LISTS for each in given.get(name, ())]
        ),
        dedupe=preset.dedupe,
        response=preset.response,
        split=preset.split,
        batch_type=preset.batch_type,
        fetches_keys=any({"key_url", "key_set", "topics", "api_secret"} & method.values.keys() for method in used),
        warnings=_weaknesses(preset, methods, given, is_own=scheme in providers),
    )


def _read(
    scheme: str, known: Preset | None, config: Mapping[str, object], where: ConfigPath
) -> tuple[Preset, dict[str, Any], Sequence[SigningMethod]]:
    """Parse what a source has under `verify`; return its provider, the values, and the signing methods with these."""
    elsewhere = dict.fromkeys(_OF_SOURCE, ": it stands beside `verify`, not in it")
    if known is None:
        given = _indexed(read_method(config, scheme, GENERIC[scheme], where, elsewhere=elsewhere))
        own = Preset(methods=(), id=identity_of(given), handshake=given.get("handshake"), about={})
        return own, given, [SigningMethod(scheme, given)]
    keys = user_keys(scheme, known)
    elsewhere |= dict.fromkeys(GENERIC["hmac"], f": `scheme: {scheme}` defines it")
    elsewhere["tolerance"] = f": `scheme: {scheme}` signs no timestamp"
    if "secrets" not in keys:
        elsewhere["secrets"] = f": `scheme: {scheme}` is verified without"
    given = _indexed(
        read_keys({name: each for name, each in config.items() if name != "scheme"}, keys, where, elsewhere)
    )
    methods = known.with_given(given)
    _refuse_unused_secrets(methods, given, where)
    return known, given, methods


def _refuse_unused_secrets(methods: Sequence[SigningMethod], given: Mapping[str, Any], where: ConfigPath) -> None:
    """Report secrets that no method uses, as each is for those that begin in another way."""
    used = {secret.position for method in methods for secret in method.values.get("secrets", ())}
    for secret in given.get("secrets", ()):
        if secret.position not in used:
            beginnings = " or ".join(dict.fromkeys([each.secret_prefix for each in methods if each.secret_prefix]))
            message = f"expected a secret that starts with {beginnings}, got another"
            where.below("secrets").below(secret.position).report(message)


def _indexed(given: dict[str, Any]) -> dict[str, Any]:
    """Give each secret and public key of a source its index among all of them."""
    count = 0
    for name in LISTS:
        if name in given:
            given[name] = tuple([each._replace(secret_index=count + index) for index, each in enumerate(given[name])])
            count += len(given[name])
    return given


def _weaknesses(
    preset: Preset, methods: Sequence[SigningMethod], given: Mapping[str, Any], *, is_own: bool
) -> tuple[tuple[Path, str], ...]:
    found: dict[tuple[Path, str], None] = {}
    where = ConfigPath((), found)
    if preset.about.get("evidence") == UNCONFIRMED:
        where.below("scheme").report(
            "written from the provider's documentation alone, and not compared with a signature of its own: "
            "see that its events are accepted"
        )
    partial = [method for method in methods if "signed" in method.values and not method.values["signed"].covers_body]
    if partial:
        where.below("scheme").report("expected a signature of the whole body, got one of some fields: see its notes")
    if any(method.values["signed"].covers_checksum_alone for method in methods if "signed" in method.values):
        where.below("scheme").report(
            "expected a signature of the body, got one of its CRC-32: whoever has seen a request can make another body"
        )
    if given.get("pending"):
        where.below("pending").report("accepts a token from anybody: replace it with the secret once you have it")
    for method in methods:
        _report_weakness(method, where.below("scheme"))
    _report_tolerances(methods, given, where, is_own=is_own)
    for method in methods:
        for secret in method.values.get("secrets", ()):
            if len(decode_secret(secret.text, method.values.get("secret_encoding", "raw"))) < WEAK:
                expected = f"expected a secret of at least {WEAK} bytes"
                where.below("secrets").below(secret.position).report(
                    f"{expected}, got a shorter one, which can be guessed"
                )
    return tuple(found)


def _report_tolerances(
    methods: Sequence[SigningMethod], given: Mapping[str, Any], where: ConfigPath, *, is_own: bool
) -> None:
    """Report timestamps that may be of any time; those of presets are in their documents."""
    if given.get("tolerance") == math.inf:
        where.below("tolerance").report("expected a duration, got none: a recorded request can be replayed at any time")
    elif is_own and any(method.values.get("tolerance") == math.inf for method in methods):
        expected = "expected a provider whose tolerance is a duration"
        where.below("scheme").report(f"{expected}, got none: a recorded request can be replayed at any time")


def _report_weakness(method: SigningMethod, where: ConfigPath) -> None:
    """Report what makes a signing method prove less than it seems to."""
    match method.scheme:
        case "jwt" if "key_set" in method.values and not {name for name, _ in method.values.get("claims", ())} - {
            "iss"
        }:
            where.report(
                "expected claims of the token, such as aud, got none: every token of whoever publishes the key_set "
                "is accepted, whomever it was made for"
            )
        case "hash" if "signed" in method.values and method.values["signed"].parts[-1] != SECRET:
            where.report(
                "expected hmac, or a hash of a string that ends with {secret}, got one that ends with something else: "
                "whoever has seen a request can append to it (length extension)"
            )
        case _:
            pass
