"""Sinch's library signs and verifies."""

import random

from sinch.domains.authentication.sinch_events.v1.authentication_validation import validate_signature_header

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "sinch (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, eventType="PROVISIONING_TO_VOICE_PLATFORM")
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    try:
        body = request.body.decode("utf-8", "replace")
        return bool(validate_signature_header(signed.config["secrets"][0], headers, body))
    except TypeError:
        return False
