"""The vendors' own libraries take what `gateway trigger` sends, as their users call them: its signature and its fields.

Libraries with models of events (GitHub's OpenAPI description, Stripe, Paddle, OpenAI) read the body by these, too.
"""

import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import orjson
import pytest
import stripe
from Adyen.util import is_valid_hmac_notification
from githubkit.webhooks import parse, verify
from hubspot.utils.signature import Signature
from openai import OpenAI
from paddle_billing.Entities.Notifications import NotificationEvent
from paddle_billing.Notifications import Secret, Verifier
from razorpay.utility.utility import Utility
from resend import Webhooks
from sendgrid.helpers.eventwebhook import EventWebhook
from slack_sdk.signature import SignatureVerifier
from square.utils.webhooks_helper import verify_signature
from standardwebhooks import Webhook as StandardWebhook
from svix.webhooks import Webhook as SvixWebhook
from twilio.request_validator import RequestValidator

from gateway.ops.fixtures import Fixture, fixtures
from gateway.ops.fixtures.renewal import renewed
from gateway.ops.send import Signed, source_of
from gateway.ops.trigger import request_of
from tests.ops.providers_rules import config_of, private_keys, rules, vectors_by_scheme
from tests.oracles.conftest import SEED


def secret_of(provider: str) -> str:
    keys: Any = config_of(provider)
    return str((keys.get("secrets") or keys["public_keys"])[0])


def lower(request: Signed) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers}


def adyen(request: Signed) -> None:
    for each in orjson.loads(request.body)["notificationItems"]:
        assert is_valid_hmac_notification(each["NotificationRequestItem"], secret_of("adyen"))


def clerk(request: Signed) -> None:
    SvixWebhook(secret_of("clerk")).verify(request.body, lower(request))


def github(request: Signed) -> None:
    headers = lower(request)
    assert verify(secret_of("github"), request.body, headers["x-hub-signature-256"])
    parse(headers["x-github-event"], request.body)


def gitlab(request: Signed) -> None:
    StandardWebhook(secret_of("gitlab")).verify(request.body, lower(request))


def hubspot(request: Signed) -> None:
    headers, url = lower(request), vectors_by_scheme()["hubspot"].public_url
    signature, stamp = headers["x-hubspot-signature-v3"], headers["x-hubspot-request-timestamp"]
    assert Signature.is_valid(signature, secret_of("hubspot"), request.body.decode(), url, "POST", "v3", stamp)


def openai(request: Signed) -> None:
    event = OpenAI(api_key="k").webhooks.unwrap(request.body, lower(request), secret=secret_of("openai"))
    assert event.type == "response.completed"


def paddle(request: Signed) -> None:
    given = SimpleNamespace(headers={"Paddle-Signature": lower(request)["paddle-signature"]}, body=request.body)
    assert Verifier().verify(given, Secret(secret_of("paddle")))
    assert NotificationEvent.from_dict(orjson.loads(request.body)).event_type == "transaction.completed"


def razorpay(request: Signed) -> None:
    signature = lower(request)["x-razorpay-signature"]
    assert Utility().verify_webhook_signature(request.body.decode(), signature, secret_of("razorpay"))


def resend(request: Signed) -> None:
    headers = {name: lower(request)[f"svix-{name}"] for name in ("id", "timestamp", "signature")}
    Webhooks.verify({"payload": request.body.decode(), "headers": headers, "webhook_secret": secret_of("resend")})


def sendgrid(request: Signed) -> None:
    headers, name = lower(request), "x-twilio-email-event-webhook"
    given = (request.body.decode(), headers[f"{name}-signature"], headers[f"{name}-timestamp"])
    assert EventWebhook(secret_of("sendgrid")).verify_signature(*given)


def slack(request: Signed) -> None:
    assert SignatureVerifier(secret_of("slack")).is_valid_request(request.body, dict(request.headers))


def square(request: Signed) -> None:
    signature, url = lower(request)["x-square-hmacsha256-signature"], str(vectors_by_scheme()["square"].public_url)
    assert verify_signature(
        request_body=request.body.decode(), signature_header=signature, signature_key=secret_of("square"),
        notification_url=url,
    )  # fmt: skip


def stripe_(request: Signed) -> None:
    event = stripe.Webhook.construct_event(request.body, lower(request)["stripe-signature"], secret_of("stripe"))
    assert event.data.object.object in {"invoice", "checkout.session", "subscription", "payment_intent"}


def twilio(request: Signed) -> None:
    form = dict(parse_qsl(request.body.decode(), keep_blank_values=True))
    url = vectors_by_scheme()["twilio"].public_url
    assert RequestValidator(secret_of("twilio")).validate(url, form, lower(request)["x-twilio-signature"])


JUDGES: Mapping[str, Callable[[Signed], None]] = {
    each.__name__.rstrip("_"): each
    for each in (
        *(adyen, clerk, github, gitlab, hubspot, openai, paddle, razorpay),
        *(resend, sendgrid, slack, square, stripe_, twilio),
    )
}
JUDGED = [each for each in fixtures() if each.provider in JUDGES]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "routes.yaml"
    path.write_text(rules())
    return path


@pytest.mark.parametrize("found", JUDGED, ids=lambda found: f"{found.provider}-{found.name}")
def test_the_library_takes_it_and_no_forged_one(found: Fixture, file: Path) -> None:
    source, verifier = source_of(file, found.provider, secret=private_keys().get(found.provider))
    draw, now = random.Random(f"{SEED}/{found.provider}/{found.name}"), time.time()
    for event in (found, renewed(found, now=now, draw=draw)):
        JUDGES[found.provider](request_of(event, source, verifier, url="http://127.0.0.1:8080", now=now))
        forged = request_of(event, source, verifier, url="http://127.0.0.1:8080", now=now, is_forged=True)
        with pytest.raises(Exception):  # noqa: B017, PT011 - each library has its own
            JUDGES[found.provider](forged)


def test_the_libraries_judge_the_most() -> None:
    assert len(JUDGED) >= 28
