"""Signing methods: what a source's `verify:` and each method of a provider have in common.

Both are read here, so that what is refused of one is refused of the other. A provider's lacks only what its user gives:
the secrets, or the public keys.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from gateway.verify.config_keys import CHOICES, SCHEMES, refuse_ambiguous, refuse_uncovered
from gateway.verify.config_reader import ConfigPath, Key, Path, read_keys
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.json_web_tokens import SYMMETRIC
from gateway.verify.message_signatures import HMAC
from gateway.verify.signed_string import SignedString

_GIVEN = re.compile(r"\{given:([^}]*)\}")


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

    @property
    def signature_headers(self) -> tuple[str, ...]:
        """Return the headers that hold its signatures; () if they, or a credential, are elsewhere."""
        found = self.values.get("header", ()) if self.scheme in {"hmac", "hash", "public-key"} else ()
        headers: tuple[str, ...] = found
        return headers

    @property
    def proof(self) -> str | None:
        """Return the key under which a source gives what verifies a provider's method: `secrets` or `public_keys`.

        None if it gives nothing: the keys are at an address, or there are none. Public keys of the provider's own may
        be replaced.
        """
        needed = proofs(self.scheme, self.values)
        is_fetched = any(name in self.values for name in needed[1:])
        return needed[0] if needed and not is_fetched else None


def proofs(scheme: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of which a method has one, as its algorithm demands: what its signatures are verified by.

    The first one is a list of secrets or of public keys, and any other an address of keys. There is none if nothing is
    verified so, or if the algorithm has a problem.
    """
    match scheme:
        case "public-key":
            return ("public_keys", "key_url")
        case "jwt":
            algorithm = next(iter(values.get("algorithms", ())), None)
        case "http-message-signature":
            algorithm = values.get("algorithm")
        case _:
            return ("secrets",) if "secrets" in SCHEMES[scheme] else ()
    if algorithm is None:
        return ()
    return ("secrets",) if algorithm in {*SYMMETRIC, HMAC} else ("public_keys", "key_set")


def identity_of(values: Mapping[str, Any]) -> str | None:
    """Return the CEL of what identifies an event by its signed header; None if there is none."""
    header: str | None = values.get("id_header")
    return header and f'headers["{header.lower()}"]'


def read_method(
    config: Mapping[Any, object],
    scheme: str,
    keys: Mapping[str, Key],
    where: ConfigPath,
    *,
    asks: Collection[str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Parse the keys of a method, and report those that contradict each other; return the values.

    `asks` are the names that a provider asks its users for; None for a method of a source, which has its secrets.
    `elsewhere` says of other keys why they aren't among these.
    """
    values = read_keys({name: each for name, each in config.items() if name != "scheme"}, keys, where, elsewhere)
    _refuse_contradictions(scheme, config, values, where, asks)
    return values


def _refuse_contradictions(
    scheme: str,
    config: Mapping[Any, object],
    values: Mapping[str, Any],
    where: ConfigPath,
    asks: Collection[str] | None,
) -> None:
    """Report combinations of keys that contradict each other. `values` lacks those that already have a problem."""
    for names in CHOICES.get(scheme, ()):
        found = [name for name in names if name in config]
        if len(found) > 1 or not (found or (asks is not None and "public_keys" in names)):
            what = "where the signature is, one of" if "header" in names and "form" in names else "one of"
            where.report(f"expected {what} {', '.join(names)}, got {' and '.join(found) or 'none'}")
    if asks is None:
        _refuse_unused_tokens(config, values, where)
    signed = values.get("signed")
    refuse_uncovered(values, where)
    if signed is not None:
        _refuse_unsigned(config, values, where)
        if scheme == "hmac" and signed.has("secret"):
            where.below("signed").report("expected no {secret} with hmac, which is keyed with it, got it")
        if scheme == "hash" and not signed.has("secret"):
            where.below("signed").report("expected {secret} in 'signed', as anybody can make a hash without, got none")
    _refuse_ungiven(values, where, asks)
    _refuse_partial_claims(values, where)
    if scheme in _REFUSE_KEYS:
        _REFUSE_KEYS[scheme](config, values, where, is_in_source=asks is None)
    elif "tolerance" in config and "timestamp" not in config:
        where.below("tolerance").report("expected the key 'timestamp' beside 'tolerance', got none")
    if {"prefix", "position"} & values.get("timestamp", {}).keys() and "separator" not in config:
        where.below("timestamp").report("expected the key 'separator' with a timestamp's prefix, got none")
    refuse_ambiguous(values, where)


def _refuse_unused_tokens(config: Mapping[Any, object], values: Mapping[str, Any], where: ConfigPath) -> None:
    has_token = values.get("handshake") is not None and HANDSHAKES[values["handshake"]].has_token
    if has_token and "verify_tokens" not in config:
        where.below("handshake").report("expected the key 'verify_tokens' with this handshake, got none")
    if "verify_tokens" in config and not has_token:
        where.below("verify_tokens").report("expected a 'handshake' that has tokens beside it, got none")


def _refuse_ungiven(values: Mapping[str, Any], where: ConfigPath, asks: Collection[str] | None) -> None:
    """Report `{given:NAME}` of what nobody is asked for: nothing would replace it."""
    for path, name in _given_names(values):
        here = where
        for step in path:
            here = here.below(step)
        if asks is None:
            here.report("expected no {given:…}, which only a provider's definition may have")
        elif name not in asks:
            here.report(f"expected {{given:NAME}} of a name under 'asks', got {{given:{name}}}")


def _given_names(values: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield the names in `{given:NAME}`, each with where it is written."""
    templates: list[tuple[Path, object]] = [(("signed",), values.get("signed"))]
    templates += [(("claims", name), each) for name, each in values.get("claims", ())]
    for path, template in templates:
        if isinstance(template, SignedString):
            yield from [(path, name) for name in template.given_names]
    texts = ((("prefix",), values.get("prefix", b"").decode()), (("recipient", "is"), recipient(values).get("is", "")))
    for path, text in texts:
        yield from [(path, name) for name in _GIVEN.findall(text)]


def recipient(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the field and the value of a recipient; empty if there is none."""
    found: Mapping[str, Any] = values.get("recipient", {})
    return found


def _refuse_partial_claims(values: Mapping[str, Any], where: ConfigPath) -> None:
    """Report what a claim can't be compared with, since only a signed string has it."""
    for name, template in values.get("claims", ()):
        for kind in ("id", "timestamp", "secret"):
            if isinstance(template, SignedString) and template.has(kind):
                where.below("claims").below(name).report(f"expected no {{{kind}}} in a claim, got it")


def _refuse_mixed_keys(
    _: Mapping[Any, object], values: Mapping[str, Any], where: ConfigPath, *, is_in_source: bool
) -> None:
    """Report keys of another kind than the algorithms of a token, or none."""
    if "algorithms" in values:
        needed = proofs("jwt", values)
        other = "public_keys" if needed == ("secrets",) else "secrets"
        found = [name for name in needed if name in values]
        if len(found) > 1 or (is_in_source and not found):
            expected = f"expected the key {' or '.join(map(repr, needed))} with {', '.join(values['algorithms'])}"
            where.report(f"{expected}, got {' and '.join(found) or 'none'}")
        if needed == ("secrets",) and "key_set" in values:
            where.below("key_set").report(f"expected no 'key_set' with {', '.join(values['algorithms'])}, got one")
        if other in values:
            where.below(other).report(f"expected no {other!r} with {', '.join(values['algorithms'])}, got some")


def _refuse_other_keys(
    config: Mapping[Any, object], values: Mapping[str, Any], where: ConfigPath, *, is_in_source: bool
) -> None:
    """Report keys of another kind than the algorithm of a message signature, or none."""
    if "algorithm" not in values:
        return
    needed = proofs("http-message-signature", values)
    found = [name for name in needed if name in config]
    if len(found) > 1 or (is_in_source and not found):
        expected = f"expected the key {' or '.join(map(repr, needed))} with {values['algorithm']}"
        where.report(f"{expected}, got {' and '.join(found) or 'none'}")
    usable = {*needed, "secret_encoding"} if needed == ("secrets",) else {*needed}
    for name in ("secrets", "secret_encoding", "public_keys", "key_set"):
        if name in config and name not in usable:
            where.below(name).report(f"expected no {name!r} with {values['algorithm']}, got some")


_REFUSE_KEYS = {"jwt": _refuse_mixed_keys, "http-message-signature": _refuse_other_keys}


def _refuse_unsigned(config: Mapping[Any, object], values: Mapping[str, Any], where: ConfigPath) -> None:
    signed = values["signed"]
    if signed.has("timestamp") and "timestamp" not in config:
        where.below("signed").report("expected the key 'timestamp' with {timestamp}, got none")
    stamp = values.get("timestamp", {})
    # A field of the body is signed with the body.
    is_in_body = "field" in stamp and (signed.covers_body or "body_digest" in values)
    is_header = "header" in stamp and signed.covers_header(stamp["header"])
    if "timestamp" in config and not (signed.has("timestamp") or is_in_body or is_header):
        where.below("timestamp").report("expected {timestamp} in 'signed', as it proves nothing unsigned, got none")
    if signed.has("id") and "id_header" not in config:
        where.below("signed").report("expected the key 'id_header' with {id}, got none")
    if "id_header" in values and not (signed.has("id") or signed.covers_header(values["id_header"])):
        where.below("id_header").report(
            "expected {id} in 'signed', as anyone could choose an unsigned identity, got none"
        )
