"""Handshakes: requests by which a provider asks whether an address is ours, before it sends events. They are no events.

A preset names its handshake, and the logic is here, one function for each. There are three kinds. Most are verified as
an event is, and only then answered. Others come without a signature: they are answered by their head (method, query,
headers) alone. Of a source that is `pending`, the token in the body is answered, and kept to be shown. The response to
an unverified sender reveals nothing that it doesn't already have, or isn't entitled to.

A response that is signed with the source's secret signs what its sender chooses, who may be anybody. So a challenge
must match `signed_challenge`, and an event whose signed string matches it is refused: else a response could be used as
an event's signature.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from gateway.model import RefusedError, UnreadableBodyError
from gateway.verify.check import MAX_CHALLENGE
from gateway.verify.key_ring import KeyRing
from gateway.verify.request import Reason, Request
from gateway.verify.sns import SNS_HOST

# A handshake is a few hundred bytes; a larger body isn't parsed to find out.
MAX_HANDSHAKE_BYTES = 16 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")
_BRAINTREE_CHALLENGE = re.compile(r"[a-f0-9]{20,32}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_OPAQUE = re.compile(r"[A-Za-z0-9_=+/.-]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeResponse:
    """The response that the ingress sends instead of appending an event.

    With `confirm_url`, that address has to be requested first, to confirm a subscription. A `token` is shown to
    operators.
    """

    status: int = 200
    content_type: str = "text/plain"
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    confirm_url: str = ""
    token: str = field(default="", repr=False)


class HandshakeKeys(NamedTuple):
    """What a handshake needs of its source: its secrets, its verify tokens, and other keys of its `verify:`."""

    secrets: KeyRing[bytes] = KeyRing()
    verify_tokens: Sequence[bytes] = ()
    parameters: Mapping[str, str] = MappingProxyType({})

    def at(self, now: float) -> "HandshakeKeys":
        """Return those that verify at a time (Unix seconds)."""
        if self.secrets.never_expires:
            return self
        return self._replace(secrets=KeyRing(tuple(self.secrets.at(now))))


Respond = Callable[[Request, HandshakeKeys], HandshakeResponse | None]
"""Returns None for every request that isn't the handshake; cheap then, since each event passes through it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """A provider's handshake.

    One with `methods` is answered by the head of requests with these, unverified; any other after verification. With
    `has_token`, a source takes the key `verify_tokens`; with `required_keys`, a provider's `asks:` must have these. One
    that `shows_token` is answered while the source is `pending`, unsigned. One with a `signed_challenge` answers with
    an HMAC, by the source's secret, of a challenge that matches it.
    """

    respond: Respond = field(repr=False)
    methods: tuple[str, ...] = ()
    has_token: bool = False
    required_keys: tuple[str, ...] = ()
    shows_token: bool = False
    signed_challenge: re.Pattern[str] | None = None


_NO_SNIFFING = (("X-Content-Type-Options", "nosniff"),)
"""What comes back is what somebody has sent: no browser is to take it for a page."""


def _text(value: str) -> HandshakeResponse:
    return HandshakeResponse(body=value.encode("utf-8", "surrogatepass"), headers=_NO_SNIFFING)


def _json(value: object) -> HandshakeResponse:
    return HandshakeResponse(content_type="application/json", body=orjson.dumps(value), headers=_NO_SNIFFING)


def _challenge(value: object) -> str | None:
    """Return a challenge in a body that may be sent back; None for what is none, or too long to be one."""
    return value if isinstance(value, str) and len(value) <= MAX_CHALLENGE else None


def _payload(request: Request, hint: bytes) -> dict[str, Any]:
    """Return a JSON body that has a hint in it; an empty mapping for any other."""
    payload = _parsed(request, hint)
    return payload if isinstance(payload, dict) else {}


def _parsed(request: Request, hint: bytes = b"") -> object:
    """Return the value of a JSON body that has a hint in it, decompressed; None for any other, which is an event."""
    if len(request.body) > MAX_HANDSHAKE_BYTES:
        return None
    try:
        content = request.content(MAX_HANDSHAKE_BYTES)
        return orjson.loads(content) if hint in content else None
    except (UnreadableBodyError, orjson.JSONDecodeError):
        return None


def _parameter(request: Request, name: str) -> str | None:
    """Return a query parameter, decoded; None unless it is there once. Raises RefusedError for one that is too long."""
    return _only(request.parameters(name), name)


def _only(parameters: Mapping[str, Sequence[str]], name: str) -> str | None:
    found = parameters[name]
    if len(found) != 1:
        return None
    if len(found[0]) > MAX_CHALLENGE:
        raise RefusedError(400, "bad_handshake", f"expected {name} of at most {MAX_CHALLENGE} characters, got more")
    return found[0]


def _header(request: Request, name: bytes) -> str | None:
    values = request.values(name)
    if len(values) != 1 or len(values[0]) > MAX_CHALLENGE:
        return None
    return values[0].decode("utf-8", "replace")


# ---- Answered after verification ----


def _slack(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://docs.slack.dev/reference/events/url_verification: signed like an event."""
    payload = _payload(request, b"url_verification")
    challenge = _challenge(payload.get("challenge"))
    return None if payload.get("type") != "url_verification" or challenge is None else _text(challenge)


def _zoom(request: Request, keys: HandshakeKeys) -> HandshakeResponse | None:
    """https://developers.zoom.us/docs/api/webhooks/#validate-your-webhook-endpoint: signed like an event."""
    payload = _payload(request, b"endpoint.url_validation")
    inner = payload.get("payload")
    if payload.get("event") != "endpoint.url_validation" or not isinstance(inner, dict):
        return None
    token = inner.get("plainToken")
    if not isinstance(token, str) or not _OPAQUE.fullmatch(token) or not keys.secrets.entries:
        return None
    signed = hmac.digest(keys.secrets.entries[0].key, token.encode(), "sha256")
    return _json({"plainToken": token, "encryptedToken": signed.hex()})


def _discord(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://discord.com/developers/docs/interactions/overview#setting-up-an-endpoint, and webhook events' PING."""
    payload = _payload(request, b'"type"')
    match payload.get("type"):
        case 1 if "event" not in payload:
            return _json({"type": 1})
        case 0:
            return HandshakeResponse(status=204, content_type="application/json")
        case _:
            return None


def _twitch(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://dev.twitch.tv/docs/eventsub/handling-webhook-events/#responding-to-a-challenge-request."""
    if request.values(b"twitch-eventsub-message-type") != [b"webhook_callback_verification"]:
        return None
    challenge = _challenge(_payload(request, b"challenge").get("challenge"))
    return None if challenge is None else _text(challenge)


def _challenge_json(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """Monday and Lark: `{"challenge": …}` is sent back as it is."""
    payload = _payload(request, b"challenge")
    challenge = _challenge(payload.get("challenge"))
    if challenge is None or not ({"challenge"} == payload.keys() or payload.get("type") == "url_verification"):
        return None
    return _json({"challenge": challenge})


def _front(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://dev.frontapp.com/docs/webhooks-1: a signed request with the header `x-front-challenge`."""
    challenge = _header(request, b"x-front-challenge")
    return None if challenge is None else _text(challenge)


def _smartsheet(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://developers.smartsheet.com/api/smartsheet/guides/webhooks/webhook-verification."""
    challenge = _header(request, b"smartsheet-hook-challenge")
    if challenge is None:
        return None
    return _json({"smartsheetHookResponse": challenge})


def _event_grid(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://learn.microsoft.com/en-us/azure/event-grid/end-point-validation-event-grid-events-schema: exactly 200."""
    if request.values(b"aeg-event-type") != [b"SubscriptionValidation"]:
        return None
    match _parsed(request):
        case [{"data": {"validationCode": code}}] if _challenge(code) is not None:
            return _json({"validationResponse": code})
        case _:
            return None


_SUBSCRIBE = re.compile(rf"https://{SNS_HOST}/\?Action=ConfirmSubscription&[A-Za-z0-9&=:%._~-]{{1,1500}}")


def _sns(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://docs.aws.amazon.com/sns/latest/dg/http-subscription-confirmation-json.html: of a topic of the source."""
    payload = _payload(request, b"Confirmation")
    match payload.get("Type"):
        case "SubscriptionConfirmation":
            url = payload.get("SubscribeURL")
            if isinstance(url, str) and _SUBSCRIBE.fullmatch(url):
                return HandshakeResponse(confirm_url=url)
            raise RefusedError(
                400, "bad_handshake", "expected SubscribeURL to be an address of SNS, got something else"
            )
        case "UnsubscribeConfirmation":
            return HandshakeResponse()
        case _:
            return None


# ---- Answered by the body alone, unverified, while the source is pending ----


def _notion(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://developers.notion.com/reference/webhooks#step-2-validating-the-subscription.

    Unverified, so that it isn't decompressed.
    """
    if request.content_codings():
        return None
    match _payload(request, b"verification_token"):
        case {"verification_token": str(token), **rest} if not rest and _TOKEN.fullmatch(token):
            return HandshakeResponse(token=token)
        case _:
            return None


# ---- Answered by the head alone, unverified ----


def _meta(request: Request, keys: HandshakeKeys) -> HandshakeResponse | None:
    """https://developers.facebook.com/docs/graph-api/webhooks/getting-started#verification-requests."""
    found = request.parameters("hub.mode", "hub.verify_token", "hub.challenge")
    if _only(found, "hub.mode") != "subscribe":
        return None
    token, challenge = _only(found, "hub.verify_token"), _only(found, "hub.challenge")
    given = (token or "").encode("utf-8", "surrogatepass")
    is_known = False
    for each in keys.verify_tokens:  # all of them: the time taken doesn't depend on which one matched
        is_known |= hmac.compare_digest(given, each)
    if challenge is None or not is_known:
        raise RefusedError(403, Reason.BAD_CREDENTIALS.value, "expected a known hub.verify_token, got another one")
    return _text(challenge)


def _x(request: Request, keys: HandshakeKeys) -> HandshakeResponse | None:
    """https://docs.x.com/x-api/webhooks/introduction: a challenge-response check, hourly and whenever X likes."""
    token = _parameter(request, "crc_token")
    if token is None or not keys.secrets.entries:
        return None
    if not _OPAQUE.fullmatch(token):
        raise RefusedError(400, "bad_handshake", "expected a crc_token of letters and digits, got something else")
    digest = hmac.digest(keys.secrets.entries[0].key, token.encode(), "sha256")
    return _json({"response_token": f"sha256={base64.b64encode(digest).decode()}"})


def _asana(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://developers.asana.com/docs/webhooks-guide#the-webhook-handshake: the secret comes back in its header.

    Nothing is kept: whoever creates the webhook gets the secret in the response to that, and a secret that isn't in the
    rules verifies nothing. A request with a signature is an event.
    """
    values = request.values(b"x-hook-secret")
    if len(values) != 1 or request.values(b"x-hook-signature"):
        return None
    secret = values[0].decode("latin-1")
    return HandshakeResponse(headers=(("X-Hook-Secret", secret),)) if _OPAQUE.fullmatch(secret) else None


def _braintree(request: Request, keys: HandshakeKeys) -> HandshakeResponse | None:
    """https://developer.paypal.com/braintree/docs/guides/webhooks/parse: as its libraries' `verify` does it.

    The challenge is signed as an event's payload is.
    """
    challenge = _parameter(request, "bt_challenge")
    if challenge is None or not keys.secrets.entries:
        return None
    if not _BRAINTREE_CHALLENGE.fullmatch(challenge):
        raise RefusedError(
            400, "bad_handshake", "expected a bt_challenge of 20 to 32 hexadecimal digits, got something else"
        )
    key = hashlib.sha1(keys.secrets.entries[0].key, usedforsecurity=False).digest()
    return _text(f"{keys.parameters.get('public_key', '')}|{hmac.digest(key, challenge.encode(), 'sha1').hex()}")


def _okta(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://developer.okta.com/docs/concepts/event-hooks/#one-time-verification-request."""
    challenge = _header(request, b"x-okta-verification-challenge")
    return None if challenge is None else _json({"verification": challenge})


def _linkedin(request: Request, keys: HandshakeKeys) -> HandshakeResponse | None:
    """https://learn.microsoft.com/en-us/linkedin/shared/api-guide/webhook-validation: every two hours."""
    challenge = _parameter(request, "challengeCode")
    if challenge is None or not keys.secrets.entries:
        return None
    if not _UUID.fullmatch(challenge):
        raise RefusedError(400, "bad_handshake", "expected a challengeCode that is a UUID, got something else")
    signed = hmac.digest(keys.secrets.entries[0].key, challenge.encode(), "sha256")
    return _json({"challengeCode": challenge, "challengeResponse": signed.hex()})


def _echo_of(name: str) -> Respond:
    """Return a handshake that sends a query parameter back as it is."""

    def respond(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
        value = _parameter(request, name)
        return None if value is None else _text(value)

    return respond


def _exists(_: Request, __: HandshakeKeys) -> HandshakeResponse | None:
    """Trello, SurveyMonkey, Mandrill and Intercom ask by HEAD whether the address exists, Mailchimp by GET."""
    return HandshakeResponse()


def _cloudevents(request: Request, _: HandshakeKeys) -> HandshakeResponse | None:
    """https://github.com/cloudevents/spec/blob/main/cloudevents/http-webhook.md#41-validation-request."""
    origin = _header(request, b"webhook-request-origin")
    if origin is None or not re.fullmatch(r"[\x21-\x7e]+", origin):
        return None
    rate = _header(request, b"webhook-request-rate")
    headers = [("Allow", "POST, OPTIONS"), ("WebHook-Allowed-Origin", origin)]
    if rate is not None:
        headers.append(("WebHook-Allowed-Rate", rate if rate.isascii() and rate.isdigit() else "*"))
    return HandshakeResponse(headers=tuple(headers))


HANDSHAKES: Mapping[str, Handshake] = {
    "slack": Handshake(respond=_slack),
    "zoom": Handshake(respond=_zoom, signed_challenge=_OPAQUE),
    "discord": Handshake(respond=_discord),
    "twitch": Handshake(respond=_twitch),
    "challenge-json": Handshake(respond=_challenge_json),
    "front": Handshake(respond=_front),
    "smartsheet": Handshake(respond=_smartsheet),
    "event-grid": Handshake(respond=_event_grid),
    "sns": Handshake(respond=_sns),
    "notion": Handshake(respond=_notion, shows_token=True),
    "meta": Handshake(respond=_meta, methods=("GET",), has_token=True),
    "x": Handshake(respond=_x, methods=("GET",), signed_challenge=_OPAQUE),
    "asana": Handshake(respond=_asana, methods=("POST",)),
    "braintree": Handshake(
        respond=_braintree, methods=("GET",), required_keys=("public_key",), signed_challenge=_BRAINTREE_CHALLENGE
    ),
    "linkedin": Handshake(respond=_linkedin, methods=("GET",), signed_challenge=_UUID),
    "okta": Handshake(respond=_okta, methods=("GET",)),
    # Dropbox (https://www.dropbox.com/developers/reference/webhooks#documentation) and Nylas.
    "challenge-query": Handshake(respond=_echo_of("challenge"), methods=("GET",)),
    # https://docs.onfleet.com/reference/webhooks
    "onfleet": Handshake(respond=_echo_of("check"), methods=("GET",)),
    "head": Handshake(respond=_exists, methods=("HEAD",)),
    "get": Handshake(respond=_exists, methods=("GET",)),
    # https://learn.microsoft.com/en-us/graph/change-notifications-delivery-webhooks#notificationurl-validation
    "microsoft-graph": Handshake(respond=_echo_of("validationToken"), methods=("POST",)),
    "cloudevents": Handshake(respond=_cloudevents, methods=("OPTIONS",)),
}
"""The handshakes, by the name under `handshake:` in a preset."""
