"""Handshakes: requests that a provider sends before it sends events, and their responses. They are no events.

A preset names its handshake in `providers.yaml`; the logic is here, one function per provider. Each returns None for
every request that isn't the handshake, and must be cheap then, since every event passes through it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson

from gateway.verify.request import Request

# A handshake is a few hundred bytes; a larger body isn't parsed to find out.
MAX_HANDSHAKE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeResponse:
    """The response that the ingress sends instead of appending an event."""

    status: int
    content_type: str
    body: bytes


Handshake = Callable[[Request], HandshakeResponse | None]


def slack(request: Request) -> HandshakeResponse | None:
    """Echo the challenge of a `url_verification`, which Slack signs like an event.

    https://docs.slack.dev/reference/events/url_verification
    """
    if len(request.body) > MAX_HANDSHAKE_BYTES or b"url_verification" not in request.body:
        return None
    try:
        payload = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(payload, dict) or payload.get("type") != "url_verification":
        return None
    challenge = payload.get("challenge")
    if not isinstance(challenge, str):
        return None
    return HandshakeResponse(status=200, content_type="text/plain", body=challenge.encode())


HANDSHAKES: Mapping[str, Handshake] = {"slack": slack}
