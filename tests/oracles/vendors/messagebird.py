"""MessageBird's library verifies."""

import random
from unittest import mock

from messagebird.error import ValidationError
from messagebird.request_validator import RequestValidator

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_body, a_secret

PACKAGE = "messagebird (PyPI)"
URL = "https://hooks.example.com/in/it"


def unsigned(draw: random.Random) -> Signed:
    return Signed(
        config={"secrets": [a_secret(draw, 64)]}, headers={}, body=a_body(draw), now=1_700_000_000.0, public_url=URL
    )


def accepts(request: Request, signed: Signed) -> bool:
    [token] = request.values(b"messagebird-signature-jwt")
    options = {"require": ["iss", "exp"], "verify_iat": False, "verify_exp": False}
    try:
        # Its own clock can't be set, and the tokens of test events have no `nbf`.
        with mock.patch("jwt.decode", wraps=_decode_with(options)):
            RequestValidator(signed.config["secrets"][0]).validate_signature(token.decode(), URL, request.body)
    except (ValidationError, UnicodeDecodeError):
        return False
    return True


def _decode_with(options: dict[str, object]) -> object:
    import jwt  # noqa: PLC0415 - before it is replaced

    decode = jwt.decode
    return lambda **arguments: decode(**{**arguments, "options": options})
