"""PayPal's library says which string is signed; it verifies by a function that pyOpenSSL has no more."""

import base64
import random
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from paypalrestsdk.notifications import WebhookEvent

from tests.oracles.oracle import Signed, a_body, a_secret, a_time

PACKAGE = "paypalrestsdk (PyPI)"
KEY = rsa.generate_private_key(65537, 2048)


def sign(draw: random.Random) -> Signed:
    now, webhook, body = a_time(draw), a_secret(draw, 17), a_body(draw, id="WH-1", event_type="t")
    sent_at = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    signed = WebhookEvent._get_expected_sig("d938e770-8046", sent_at, webhook, body.decode())
    signature = KEY.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    url = f"https://api.sandbox.paypal.com/v1/notifications/certs/CERT-{a_secret(draw, 8)}"
    return Signed(
        config={"webhook_id": webhook},
        headers={
            "PAYPAL-TRANSMISSION-ID": "d938e770-8046",
            "PAYPAL-TRANSMISSION-TIME": sent_at,
            "PAYPAL-CERT-URL": url,
            "PAYPAL-AUTH-ALGO": "SHA256withRSA",
            "PAYPAL-TRANSMISSION-SIG": base64.b64encode(signature).decode(),
        },
        body=body,
        now=now,
        documents={url: certificate(now)},
    )


def certificate(now: float) -> str:
    at, name = datetime.fromtimestamp(now, UTC), x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(at - timedelta(1)).not_valid_after(at + timedelta(1))
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
