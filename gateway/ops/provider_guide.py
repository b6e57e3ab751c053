"""What there is to know of a provider, from its preset or the rules: for `gateway providers` and docs/providers.md."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isinf
from typing import Any

from gateway.ops import fixtures
from gateway.rules.value_kinds import shown_duration
from gateway.verify.check_builder import DEFAULT_TOLERANCE
from gateway.verify.content import shown_path
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.presets import PRESETS, UNCONFIRMED, Preset
from gateway.verify.schemes import user_keys
from gateway.verify.signed_string import SignedString
from gateway.verify.signing_methods import SigningMethod

NOT_CONFIRMED = "not confirmed"
"""The identity of a provider's events, as long as no document of its own was found that says which one, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderGuide:
    """A provider: how it signs, in words, and what its preset says of it. Empty where nothing is known.

    `no_identity` is why the provider's events have none, if that is documented. `fixtures_unconfirmed` has, by fixture,
    what of it isn't known.
    """

    name: str
    title: str
    docs: tuple[str, ...]
    signing: tuple[str, ...]
    identity: str
    no_identity: str
    type: str
    dedupe_seconds: float | None
    handshake: str
    response: str
    secret: str
    setup: str
    deadline: str
    retries: str
    evidence: str
    notes: str
    fixtures: tuple[str, ...]
    fixtures_unconfirmed: Mapping[str, str]
    snippet: str

    @property
    def is_confirmed(self) -> bool:
        """Return whether its signatures were compared with the vendor's library or a published vector."""
        return self.evidence not in {"", UNCONFIRMED}

    def details(self) -> list[tuple[str, str]]:
        """Return what is known, each with its label, in the order in which it is read."""
        rows = [
            *[("signature", each) for each in self.signing],
            ("secret", self.secret),
            ("set up", self.setup),
            ("identity", self._shown_identity()),
            ("type", f"`{self.type}`" if self.type else ""),
            ("handshake", self.handshake),
            ("response", self.response),
            ("deadline", self.deadline),
            ("retries", self.retries),
            ("checked with", self.evidence),
            ("note", self.notes),
            ("fixtures", self._shown_fixtures()),
            ("unconfirmed in them", self._shown_unconfirmed()),
        ]
        return [(label, text) for label, text in rows if text]

    def _shown_identity(self) -> str:
        if self.identity:
            return f"`{self.identity}`"
        return f"none: {self.no_identity}" if self.no_identity else NOT_CONFIRMED

    def _shown_fixtures(self) -> str:
        names = ", ".join([f"`{name}`" for name in self.fixtures])
        return f"{names}: `gateway trigger {self.name} TYPE` sends one" if names else ""

    def _shown_unconfirmed(self) -> str:
        texts = {*self.fixtures_unconfirmed.values()}
        if len(texts) == 1 and self.fixtures_unconfirmed.keys() == {*self.fixtures}:
            return texts.pop()
        return "; ".join([f"`{name}`: {text}" for name, text in self.fixtures_unconfirmed.items()])

    def fields(self) -> Mapping[str, Any]:
        return {**asdict(self), "is_confirmed": self.is_confirmed}


def provider_guides(providers: Mapping[str, Preset] = PRESETS) -> Sequence[ProviderGuide]:
    """Return all of these providers, in their order; by default those that have a preset, by name."""
    return [provider_guide(name, preset) for name, preset in providers.items()]


def provider_guide(name: str, preset: Preset) -> ProviderGuide:
    """Describe a provider."""
    about = preset.about
    docs = about.get("docs", ())
    samples = fixtures.fixtures(name) if name in fixtures.names() else ()
    return ProviderGuide(
        name=name,
        title=about.get("title", name),
        docs=(docs,) if isinstance(docs, str) else tuple(docs),
        signing=tuple([_signing(method) for method in preset.methods]),
        identity=preset.id or ", ".join(dict.fromkeys([method.id for method in preset.methods if method.id])),
        no_identity=about.get("no_id", ""),
        type=preset.type or "",
        dedupe_seconds=preset.dedupe,
        handshake=_handshake(preset),
        response="" if preset.response is None else f"status {preset.response.status}",
        secret=about.get("secret", ""),
        setup=about.get("setup", ""),
        deadline=about.get("deadline", ""),
        retries=about.get("retries", ""),
        evidence=_evidence(about.get("evidence", "")),
        notes=about.get("notes", ""),
        fixtures=tuple([each.name for each in samples]),
        fixtures_unconfirmed={each.name: each.unconfirmed for each in samples if each.unconfirmed},
        snippet=_snippet(name, preset),
    )


def _claimed(value: SignedString | bool) -> str:  # noqa: FBT001 - a claim that is one
    return str(value).lower() if isinstance(value, bool) else value.text


def _signing(method: SigningMethod) -> str:
    values = method.values
    match method.scheme:
        case "token":
            text = f"a secret, {_place(values)}"
        case "basic":
            text = f"HTTP basic authentication, user {values.get('username', 'of yours')}"
        case "bearer":
            text = "a bearer token, in the header Authorization"
        case "none":
            text = "nothing: whoever sends is let in"
        case "http-message-signature":
            text = f"an HTTP Message Signature (RFC 9421) of {values['algorithm']}, in the header `Signature`"
        case "jwt":
            claims = ", ".join(f"`{claim}` `{_claimed(each)}`" for claim, each in values["claims"])
            also = f" with {claims}" if claims else ""
            text = f"a JSON Web Token ({', '.join(values['algorithms'])}){also}, {_place(values)}"
        case "plaid-token":
            claims = "`request_body_sha256` `{body:sha256}`"
            text = f"a JSON Web Token (ES256) with {claims}, in the header `Plaid-Verification`"
        case "sns-message":
            text = "RSA-SHA1 or RSA-SHA256, as its version says, in the field `Signature` of the body"
        case _:
            kinds = {"hmac": "HMAC-{}", "hash": "{} of a string with the secret"}
            kind = kinds.get(method.scheme, "{}").format(str(values.get("algorithm", method.scheme)).upper())
            signed = values["signed"].text.replace("\n", "\\n") if "signed" in values else "the request"
            text = f"{kind} in {values.get('encoding', 'its own form')} of `{signed}`, {_place(values)}{_time(values)}"
    if "key_url" in values:
        text += f", with the key at the address {_place(values['key_url'])}"
    return text + (f", with a secret that starts with `{method.secret_prefix}`" if method.secret_prefix else "")


def _time(values: Mapping[str, Any]) -> str:
    if "timestamp" not in values:
        return ""
    tolerance, place = values.get("tolerance", DEFAULT_TOLERANCE), values["timestamp"]
    limit = "from any time" if isinf(tolerance) else f"at most {shown_duration(tolerance)} from now"
    where = _place(place) if place.keys() & {"header", "field"} else "beside it"
    return f"; timestamp {where}, {limit}"


def _place(values: Mapping[str, Any]) -> str:
    if "field" in values:
        return f"in the field `{shown_path(values['field'])}` of the body"
    if "form" in values:
        return f"in the parameter `{values['form']}` of the form"
    if "query" in values:
        return f"in the query parameter `{values['query']}`"
    header = values.get("header", "")
    names = (header,) if isinstance(header, str) else header
    return f"in the header `{names[0]}`" + (f" to `{names[-1]}`" if len(names) > 1 else "")


def _handshake(preset: Preset) -> str:
    if preset.handshake is None:
        return ""
    if HANDSHAKES[preset.handshake].shows_token:
        return "answered by the ingress (POST, unsigned) while the source is `pending`"
    methods = HANDSHAKES[preset.handshake].methods
    return f"answered by the ingress ({', '.join(methods) or 'POST, verified like an event'})"


def _evidence(evidence: object) -> str:
    if isinstance(evidence, Mapping):
        return ", ".join(f"{kind}: {value}" for kind, value in evidence.items())
    return str(evidence)


def _snippet(name: str, preset: Preset) -> str:
    variable = re.sub(r"^(?=[0-9])|[^A-Z0-9]", "_", name.upper())
    lines = ["sources:", f"  {name}:"]
    keys = [f"scheme: {name}"]
    for key, about in user_keys(name, preset).items():
        if about.is_required or key in ("secrets", "verify_tokens"):
            value = f"${{{variable}_{key.removesuffix('s').upper()}}}"
            keys.append(f'{key}: ["{value}"]' if about.schema["type"] == "array" else f'{key}: "{value}"')
    lines.append(f"    verify: {{{', '.join(keys)}}}")
    if preset.needs_url:
        lines.append(f"    public_url: https://hooks.example.com/in/{name}")
    return "\n".join(lines)
