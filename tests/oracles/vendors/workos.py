"""WorkOS's library verifies."""

import random
import re
from unittest import mock

from workos.webhooks._verification import verify_header

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time, texts

PACKAGE = "workos (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    secret, body = a_secret(draw), a_body(draw, id="event_1", event="user.created")
    return Signed(config={"secrets": [secret]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    header = texts(request)["workos-signature"].replace(",", ", ")  # WorkOS writes a space, which ours takes as well
    if not re.match(r"t=\d+, v1=", header):  # The library cuts that off without a look.
        return False
    with mock.patch("time.time", return_value=signed.now):
        try:
            verify_header(event_body=request.body, event_signature=header, secret=signed.config["secrets"][0])
        except (ValueError, TypeError):
            return False
    return True
