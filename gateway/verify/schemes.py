"""Builds a verifier from a source's `verify:`.

Five schemes are generic (`hmac`, `token`, `basic`, `bearer`, `none`); a preset is one of them, filled in by
`providers.yaml`.

    verify:
      scheme: hmac
      header: X-Signature          where the signatures are
      algorithm: sha256            or sha1, sha512
      encoding: hex                or base64, base64url (without padding)
      separator: ","               between several elements in the header; without it the whole value is one
      prefix: v1=                  what a signature starts with; other elements are ignored
      timestamp: {prefix: t=}      an element of the same header, or {header: X-Time}; unit: s, ms or iso
      id_header: X-Id              a signed header that identifies the event
      signed: "{timestamp}.{body}" from {body} {timestamp} {id} {method} {path} {url} {header:NAME}; {{ is a brace
      tolerance: 5m                how far the timestamp may be from now, in both directions; or none
      secrets: ["..."]             any of them will do, for rotation; the first one signs test events
      secret_encoding: raw         or hex, base64, whsec (base64 after `whsec_`)
"""

import binascii
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.text import did_you_mean, shown
from gateway.verify.config_keys import (
    ENCODINGS,
    GENERIC,
    ID,
    SECRET_ENCODINGS,
    SECRETS,
    TIMESTAMP,
    TOLERANCE,
    URL,
    ConfigPath,
    Key,
    Part,
    Path,
    base64_key,
    read_keys,
    signing_key,
)
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.presets import PRESETS, Preset, SchemeError, Way
from gateway.verify.request import to_bytes
from gateway.verify.signatures import Check, Credential, Hmac, Timestamp, Unverified
from gateway.verify.verifier import Verifier

WEAK = 16  # bytes: anybody who has seen one signed request can find a shorter key by trying
DEFAULT_TOLERANCE = 300.0  # as in the libraries of Standard Webhooks, Stripe and Slack
ALWAYS_CREDENTIALS = frozenset({b"authorization", b"cookie", b"proxy-authorization"})


def build_verifier(config: Mapping[str, object], *, public_url: str | None = None) -> Verifier:
    """Build the verifier of a source's `verify:`; `public_url` is the address that the sender was given, for `{url}`.

    `public_url` has no query; if it has no path either, the request's is appended. Raises SchemeError with every
    problem. No message repeats a secret.
    """
    problems: dict[tuple[Path, str], None] = {}
    verifier = _build(config, ConfigPath((), problems), public_url)
    if verifier is None or problems:
        raise SchemeError(list(problems))
    return verifier


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the `verify:` mapping."""
    return {
        "type": "object",
        "description": "Who may send to this source, and how that is verified.",
        "properties": {"scheme": {"enum": list(_known_schemes()), "description": "A provider, or a generic scheme."}},
        "required": ["scheme"],
        "allOf": [
            {
                "if": {"properties": {"scheme": {"const": scheme}}, "required": ["scheme"]},
                "then": _keys_schema(scheme),
            }
            for scheme in _known_schemes()
        ],
    }


def _known_schemes() -> tuple[str, ...]:
    return (*GENERIC, *PRESETS)


def _user_keys(scheme: str) -> Mapping[str, Key]:
    """Return the keys allowed with this scheme: for a preset, only those that the provider doesn't define."""
    if scheme in GENERIC:
        return GENERIC[scheme]
    return {"secrets": SECRETS, "tolerance": TOLERANCE} if PRESETS[scheme].has_timestamp else {"secrets": SECRETS}


def _keys_schema(scheme: str) -> dict[str, Any]:
    keys = _user_keys(scheme)
    schema = {
        "properties": {"scheme": True, **{name: dict(key.schema) for name, key in keys.items()}},
        "required": [name for name, key in keys.items() if key.is_required],
        "additionalProperties": False,
    }
    if scheme == "token":
        schema["oneOf"] = [{"required": ["header"]}, {"required": ["query"]}]
    return schema


def _build(config: Mapping[str, object], where: ConfigPath, public_url: str | None) -> Verifier | None:
    """Build the verifier; None or an incomplete one if there are problems."""
    scheme = config.get("scheme")
    if not isinstance(scheme, str):
        where.report(f"expected the key 'scheme' with a scheme's name, got {shown(scheme)}")
        return None
    if scheme not in _known_schemes():
        hint = did_you_mean(scheme, _known_schemes()) or f", expected one of {', '.join(_known_schemes())}"
        where.below("scheme").report(f"unknown scheme {shown(scheme)}{hint}")
        return None
    given = read_keys(config, _user_keys(scheme), where)
    if scheme in GENERIC:
        header = given.get("id_header")
        preset = Preset(ways=(), id=header and f'headers["{header.lower()}"]')
        ways = [Way(scheme, given)]
        _refuse_contradictions(scheme, config, given, where)
    else:
        preset = PRESETS[scheme]
        ways = preset.with_secrets(given)
    if not public_url and any(URL in way.values.get("signed", ()) for way in ways):
        where.report("expected the source's public_url, since the address that the sender knows is signed, got none")
    # A signing method without secrets isn't checked, but the header that its senders use still carries a credential.
    tokens = [way.values for way in ways if way.scheme == "token"]
    used = [way for way in ways if way.scheme == "none" or way.values.get("secrets")]
    checks = [_check(way, where, public_url) for way in used]
    ids = tuple([way.id or preset.id for way in used])
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
        respond_to_handshake=HANDSHAKES[preset.handshake] if preset.handshake else None,
        dedupe=preset.dedupe,
        warnings=_weaknesses(ways, given),
    )


def _weaknesses(ways: Sequence[Way], given: Mapping[str, Any]) -> tuple[tuple[Path, str], ...]:
    found: dict[tuple[Path, str], None] = {}
    where = ConfigPath((), found)
    if given.get("tolerance") == math.inf:
        where.below("tolerance").report("expected a duration, got none: a recorded request can be replayed at any time")
    for way in ways:
        for secret in way.values.get("secrets", ()):
            if len(_decode(secret.text, way.values.get("secret_encoding", "raw"))) < WEAK:
                expected = f"expected a secret of at least {WEAK} bytes"
                where.below("secrets").below(secret.position).report(
                    f"{expected}, got a shorter one, which can be guessed"
                )
    return tuple(found)


def _refuse_contradictions(
    scheme: str, config: Mapping[str, object], values: Mapping[str, Any], where: ConfigPath
) -> None:
    """Report combinations of keys that contradict each other. `values` lacks those that already have a problem."""
    if scheme == "token" and ("header" in config) == ("query" in config):
        where.report(f"expected either header or query, got {'both' if 'header' in config else 'neither'}")
    signed = values.get("signed", ())
    if TIMESTAMP in signed and "timestamp" not in config:
        where.below("signed").report("expected the key 'timestamp' with {timestamp}, got none")
    if "timestamp" in config and signed and TIMESTAMP not in signed:
        where.below("timestamp").report("expected {timestamp} in 'signed', as it proves nothing unsigned, got none")
    if ID in signed and "id_header" not in config:
        where.below("signed").report("expected the key 'id_header' with {id}, got none")
    identities = {ID, Part("header", values.get("id_header", "").lower().encode())}
    if "id_header" in values and signed and not identities & {*signed}:
        where.below("id_header").report("expected {id} in 'signed', as an identity is anybody's unsigned, got none")
    if "tolerance" in config and "timestamp" not in config:
        where.below("tolerance").report("expected the key 'timestamp' with it, got none")
    if "prefix" in values.get("timestamp", ()) and "separator" not in config:
        where.below("timestamp").report("expected the key 'separator' with a timestamp's prefix, got none")


def _check(way: Way, where: ConfigPath, public_url: str | None) -> Check | None:
    """Build a check; None if a value that it needs has a problem."""
    values = way.values
    secrets = tuple([to_bytes(secret.text) for secret in values.get("secrets", ())])
    match way.scheme:
        case "hmac" if {"header", "algorithm", "encoding", "signed", "secret_encoding"} <= values.keys():
            return _hmac(values, _decoded(values, where), public_url)
        case "token":
            return Credential(header=values.get("header"), parameter=values.get("query"), secrets=secrets)
        case "basic" if "username" in values:
            user = to_bytes(values["username"])
            pairs = tuple([binascii.b2a_base64(user + b":" + secret, newline=False) for secret in secrets])
            return Credential(header="Authorization", prefix="Basic ", secrets=pairs)
        case "bearer":
            return Credential(header="Authorization", prefix="Bearer ", secrets=secrets)
        case "none":
            return Unverified()
        case _:
            return None


def _hmac(values: Mapping[str, Any], keys: tuple[bytes, ...], public_url: str | None) -> Hmac:
    encode = ENCODINGS[values["encoding"]]
    id_header: str = values.get("id_header", "")
    identity = Part("header", id_header.lower().encode())
    stamp = values.get("timestamp")
    return Hmac(
        header=values["header"],
        name=values["header"].lower().encode(),
        algorithm=values["algorithm"],
        encode=encode,
        length=len(encode(bytes(hashlib.new(values["algorithm"], usedforsecurity=False).digest_size))),
        prefix=values.get("prefix", b""),
        separator=values.get("separator"),
        timestamp=stamp
        and Timestamp(
            header=stamp.get("header"),
            name=stamp.get("header", "").lower().encode(),
            prefix=stamp.get("prefix", b""),
            unit=stamp.get("unit", "s"),
            tolerance=values.get("tolerance", DEFAULT_TOLERANCE),
        ),
        id_header=id_header or None,
        signed=tuple([identity if part == ID else part for part in values["signed"]]),
        public_url=public_url,
        keys=keys,
    )


def _decoded(values: Mapping[str, Any], where: ConfigPath) -> tuple[bytes, ...]:
    """Decode the secrets to HMAC keys; an empty key is refused, since anyone could make its signatures."""
    keys = []
    for secret in values["secrets"]:
        key = _decode(secret.text, values["secret_encoding"])
        if key:
            keys.append(key)
        else:
            expected = SECRET_ENCODINGS[values["secret_encoding"]]
            where.below("secrets").below(secret.position).report(f"expected {expected}, got a string that isn't")
    return tuple(keys)


def _decode(text: str, encoding: str) -> bytes:
    """Return the decoded key; empty if the text isn't in that encoding."""
    try:
        match encoding:
            case "raw":
                return to_bytes(text)
            case "hex":
                return binascii.unhexlify(text)
            case "whsec":
                return signing_key(text)
            case _:
                return base64_key(text)
    except ValueError:
        return b""
