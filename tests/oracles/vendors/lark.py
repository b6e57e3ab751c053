"""Lark's library verifies."""

import random

from lark_oapi.core.exception import AccessDeniedException
from lark_oapi.core.model import RawRequest
from lark_oapi.event.dispatcher_handler import EventDispatcherHandler

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "lark-oapi (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    now = a_time(draw)
    headers = {"X-Lark-Request-Timestamp": str(int(now)), "X-Lark-Request-Nonce": f"{draw.getrandbits(64):x}"}
    return Signed(config={"secrets": [a_secret(draw)]}, headers=headers, body=a_body(draw, encrypt="…"), now=now)


def accepts(request: Request, signed: Signed) -> bool:
    raw = RawRequest()
    raw.headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    raw.body = request.body
    try:
        # Not `do`, which would decrypt the body as well.
        EventDispatcherHandler()._verify_sign(raw, signed.config["secrets"][0])
    except AccessDeniedException:
        return False
    return True
