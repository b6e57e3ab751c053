"""Paddle's library verifies; what it computes for that is a signature."""

import random
import sys
from types import SimpleNamespace
from unittest import mock

from paddle_billing.Notifications import PaddleSignature, Secret, Verifier

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time, texts

PACKAGE = "paddle-python-sdk (PyPI)"


def sign(draw: random.Random) -> Signed:
    signed = unsigned(draw)
    stamp = str(int(signed.now))
    digest = PaddleSignature.calculate_hmac(signed.config["secrets"][0], f"{stamp}:".encode() + signed.body)
    headers = {"Paddle-Signature": f"ts={stamp};h1={digest.hexdigest()}"}
    return Signed(config=signed.config, headers=headers, body=signed.body, now=signed.now)


def unsigned(draw: random.Random) -> Signed:
    secret, body = f"pdl_ntfset_{a_secret(draw)}", a_body(draw, event_id="evt_1", event_type="t")
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    given = SimpleNamespace(headers={"Paddle-Signature": texts(request)["paddle-signature"]}, body=request.body)
    with mock.patch.object(sys.modules[Verifier.__module__], "time", return_value=signed.now):
        try:
            return bool(Verifier().verify(given, Secret(signed.config["secrets"][0])))
        except (ValueError, TypeError):
            return False
