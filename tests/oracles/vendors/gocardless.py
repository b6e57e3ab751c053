"""GoCardless's library verifies."""

import random

import orjson
from gocardless_pro import webhooks
from gocardless_pro.errors import InvalidSignatureError

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "gocardless-pro (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, events=[], meta={"webhook_id": "WB1"})
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    header = request.values(b"webhook-signature")[0].decode("latin-1")
    try:
        webhooks.parse(request.body, signed.config["secrets"][0], header)
    except (InvalidSignatureError, TypeError):
        return False
    except orjson.JSONDecodeError:
        return True
    return True
