"""Dropbox Sign's library verifies the hash in an event; here it signs by what it compares with."""

import hashlib
import hmac
import random

import orjson
from dropbox_sign import EventCallbackHelper
from dropbox_sign.models import EventCallbackRequest

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "dropbox-sign (PyPI)"


def sign(draw: random.Random) -> Signed:
    key, now = a_secret(draw, 64), a_time(draw)
    kind = draw.choice(["signature_request_signed", "template_created", "callback_test"])
    digest = hmac.new(key.encode(), f"{now:.0f}{kind}".encode(), hashlib.sha256).hexdigest()
    event = orjson.loads(a_body(draw, event={"event_time": f"{now:.0f}", "event_type": kind, "event_hash": digest}))
    boundary = a_secret(draw, 30)
    body = b'--%b\r\nContent-Disposition: form-data; name="json"\r\n\r\n%b\r\n--%b--\r\n' % (
        boundary.encode(), orjson.dumps(event), boundary.encode(),
    )  # fmt: skip
    return Signed(
        config={"secrets": [key]},
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        body=body,
        now=now,
        covers="fields",
    )


def accepts(request: Request, signed: Signed) -> bool:
    document = request.body.partition(b"\r\n\r\n")[2].partition(b"\r\n--")[0]
    event = {"event": {"event_metadata": None, **orjson.loads(document)["event"]}}
    try:
        return bool(EventCallbackHelper.is_valid(signed.config["secrets"][0], EventCallbackRequest.init(event)))
    except ValueError:  # no type of an event any more
        return False
