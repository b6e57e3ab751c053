"""ElevenLabs's library verifies."""

import random
from unittest import mock

from elevenlabs.errors import BadRequestError
from elevenlabs.webhooks_custom import WebhooksClient

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "elevenlabs (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = f"wsec_{a_secret(draw)}", a_body(draw, type="post_call_transcription")
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    header = request.values(b"elevenlabs-signature")[0].decode("latin-1")
    body = request.body.decode("utf-8", "replace")
    with mock.patch("time.time", return_value=signed.now):
        try:
            WebhooksClient(client_wrapper=mock.Mock()).construct_event(body, header, signed.config["secrets"][0])
        except BadRequestError:
            return False
        except ValueError as error:
            return "JSON" in type(error).__name__
    return True
