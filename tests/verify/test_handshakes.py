"""Handshakes are answered, and only handshakes."""

import pytest

from gateway.verify.handshakes import MAX_HANDSHAKE_BYTES, HandshakeResponse
from tests.verify.signed_requests import a_request, a_verifier


def test_slacks_challenge_is_echoed_as_text() -> None:
    body = b'{"token":"t","challenge":"3eZbrw1a\\u00e9","type":"url_verification"}'
    answer = a_verifier("slack").handshake(a_request(body=body))
    assert answer == HandshakeResponse(status=200, content_type="text/plain", body="3eZbrw1aé".encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"type":"event_callback","event":{"type":"message","text":"url_verification"},"challenge":"c"}',
        b'{"type":"url_verification"}',
        b'{"type":"url_verification","challenge":1}',
        b'["url_verification"]',
        b'{"type":"url_verification",',
        b'{"type":"url_verification","challenge":"c"' + b" " * MAX_HANDSHAKE_BYTES + b"}",
    ],
)
def test_a_body_without_a_challenge_is_an_event(body: bytes) -> None:
    assert a_verifier("slack").handshake(a_request(body=body)) is None


def test_a_scheme_without_a_handshake_answers_nothing() -> None:
    assert a_verifier("github").handshake(a_request(body=b'{"type":"url_verification","challenge":"c"}')) is None
