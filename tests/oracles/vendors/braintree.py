"""Braintree's library makes sample notifications, and verifies them."""

import random
import warnings
from urllib.parse import parse_qsl, urlencode

with warnings.catch_warnings(
    action="ignore", category=DeprecationWarning
):  # of deprecations, where it defines what is deprecated
    import braintree
    from braintree.exceptions.invalid_signature_error import InvalidSignatureError

from gateway.verify.request import Request
from tests.oracles.oracle import Signed, a_secret, a_time

PACKAGE = "braintree (PyPI)"


def library(public_key: str, private_key: str) -> braintree.BraintreeGateway:
    return braintree.BraintreeGateway(
        braintree.Configuration(
            braintree.Environment.Sandbox, merchant_id="m", public_key=public_key, private_key=private_key
        )
    )


def sign(draw: random.Random) -> Signed:
    public, private = a_secret(draw, 16), a_secret(draw)
    sample = library(public, private).webhook_testing.sample_notification(
        braintree.WebhookNotification.Kind.SubscriptionCanceled, a_secret(draw, 8)
    )
    payload = sample["bt_payload"].decode()
    fields = {"bt_signature": sample["bt_signature"], "bt_payload": draw.choice([payload, payload.rstrip("\n")])}
    return Signed(
        config={"secrets": [private], "public_key": public},
        headers={"Content-Type": "application/x-www-form-urlencoded"},
        body=urlencode(fields).encode(),
        now=a_time(draw),
        covers="fields",
    )


def accepts(request: Request, signed: Signed) -> bool:
    fields = dict(parse_qsl(request.body.decode()))
    gateway = library(signed.config["public_key"], signed.config["secrets"][0])
    try:
        gateway.webhook_notification.parse(fields["bt_signature"], fields["bt_payload"])
    except InvalidSignatureError:
        return False
    return True
