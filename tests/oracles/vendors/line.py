"""LINE's library verifies."""

import random

from linebot.v3.webhook import SignatureValidator

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "line-bot-sdk (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, destination="U1", events=[])
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    header = request.values(b"x-line-signature")[0].decode("latin-1")
    body = request.body.decode("utf-8", "replace")
    return bool(SignatureValidator(signed.config["secrets"][0]).validate(body, header))
