"""Sinch's library signs and verifies."""

import random

from sinch.domains.authentication.sinch_events.v1.authentication_validation import (
    validate_sinch_event_signature_with_nonce,
)

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "sinch (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    headers = {"x-sinch-webhook-signature-nonce": f"01F{draw.getrandbits(64):x}"}
    return Signed(
        config={"secrets": [a_secret(draw)]}, headers=headers, body=a_body(draw, app_id="1"), now=a_time(draw)
    )


def accepts(request: Request, signed: Signed) -> bool:
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    body = request.body.decode("utf-8", "replace")
    try:
        return bool(validate_sinch_event_signature_with_nonce(signed.config["secrets"][0], headers, body))
    except TypeError:
        return False
