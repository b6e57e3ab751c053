"""Viber's library signs and verifies."""

import random

from viberbot import Api
from viberbot.api.bot_configuration import BotConfiguration

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "viberbot (PyPI)"


def unsigned(draw: random.Random) -> Signed:
    body = a_body(draw, event="message")
    return Signed(config={"secrets": [a_secret(draw)]}, headers={}, body=body, now=a_time(draw))


def accepts(request: Request, signed: Signed) -> bool:
    bot = Api(BotConfiguration(name="bot", avatar="", auth_token=signed.config["secrets"][0]))
    header = request.values(b"x-viber-content-signature")[0].decode("latin-1")
    return bool(bot.verify_signature(request.body, header))
