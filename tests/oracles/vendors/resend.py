"""Resend's library verifies."""

import random
from base64 import b64encode
from unittest import mock

from resend.webhooks._webhooks import Webhooks

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_time, texts

PACKAGE = "resend (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = f"whsec_{b64encode(draw.randbytes(24)).decode()}", a_body(draw, type="email.sent")
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    headers = texts(request)
    if not headers["svix-signature"].startswith("v1,"):  # The library cuts that off without a look.
        return False
    with mock.patch("time.time", return_value=signed.now):
        try:
            Webhooks.verify(
                {
                    "payload": request.body.decode(),
                    "headers": {name: headers[f"svix-{name}"] for name in ("id", "timestamp", "signature")},
                    "webhook_secret": signed.config["secrets"][0],
                }
            )
        except ValueError:
            return False
    return True
