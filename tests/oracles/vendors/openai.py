"""OpenAI's library verifies."""

import random
from base64 import b64encode
from unittest import mock

from openai._exceptions import InvalidWebhookSignatureError
from openai.lib._webhooks import webhook_signature_matches

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_time, texts

PACKAGE = "openai (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = f"whsec_{b64encode(draw.randbytes(24)).decode()}", a_body(draw, id="evt_1", type="batch.completed")
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    with mock.patch("time.time", return_value=signed.now):
        try:
            secret = signed.config["secrets"][0]
            return bool(webhook_signature_matches(request.body, texts(request), secret=secret, tolerance=300))
        except (InvalidWebhookSignatureError, UnicodeDecodeError, TypeError):
            return False
