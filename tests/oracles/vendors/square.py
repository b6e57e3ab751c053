"""Square's library verifies."""

import random

from square.utils.webhooks_helper import verify_signature

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time, texts

PACKAGE = "squareup (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = a_secret(draw, 22), a_body(draw, event_id="1", type="payment.created")
    url = f"https://{a_secret(draw, 5).lower()}.example.com/in/it"
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw), public_url=url)


def accepts(request: Request, signed: Signed) -> bool:
    try:
        is_valid = verify_signature(
            request_body=request.body.decode(),
            signature_header=texts(request)["x-square-hmacsha256-signature"],
            signature_key=signed.config["secrets"][0],
            notification_url=str(signed.public_url),
        )
    except UnicodeDecodeError:
        return False
    return bool(is_valid)
