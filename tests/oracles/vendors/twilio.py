"""Twilio's library verifies; what it computes for that is a signature."""

import hashlib
import random
from urllib.parse import urlencode

from twilio.request_validator import RequestValidator

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "twilio (PyPI)"
FORM = "application/x-www-form-urlencoded"


class Parameters(dict[str, list[str]]):
    """A form as web frameworks give it to the library: a name can have several values."""

    def getlist(self, name: str) -> list[str]:
        return self[name]


def sign(draw: random.Random) -> Signed:
    token, url = a_secret(draw), f"https://{a_secret(draw, 5).lower()}.example.com/in/it"
    algorithm = draw.choice(["HMAC_SHA1", "HMAC_SHA256"])
    query = draw.choice(["", "foo=1&bar=2%20x"])
    validator = RequestValidator(token)
    if draw.random() < 0.5:
        form = Parameters({name: ["+1 555 ä&=", "", "x"][: draw.randrange(1, 4)] for name in draw.sample("bcDE_", 3)})
        body, parameters, kind = urlencode(form, doseq=True).encode(), form, FORM
    else:
        body, parameters, kind = a_body(draw, MessageSid="SM1"), Parameters(), "application/json"
        query = f"{query}&bodySHA256={hashlib.sha256(body).hexdigest()}".lstrip("&")
    full = f"{url}?{query}" if query else url
    signature = validator.compute_signature(full, parameters, algorithm)
    return Signed(
        config={"secrets": [token]}, headers={"Content-Type": kind, "X-Twilio-Signature": signature}, body=body,
        now=a_time(draw), query=query, public_url=url,
    )  # fmt: skip
