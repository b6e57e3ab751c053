"""Requests as the ingress hands them over, and what became of them."""

from collections.abc import Iterable, Mapping

import pytest

from gateway.model import RefusedError
from gateway.verify.remote_keys import KeyCache, KeyNeededError
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier

NOW = 1_700_000_000.0
SECRET = "hush"
WHSEC = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
BODY = b'{"id":"evt_1","type":"order.paid"}'

Pairs = Iterable[tuple[str | bytes, str | bytes]]


def a_request(headers: Pairs = (), *, body: bytes = BODY, query: str = "", path: str = "/in/it") -> Request:
    raw = tuple((_bytes(name), _bytes(value)) for name, value in headers)
    return Request(method="POST", path=path, query=query, headers=raw, body=body)


def a_verifier(scheme: str = "hmac", *, public_url: str | None = None, **config: object) -> Verifier:
    """Build a verifier; without a config, `hmac` over the body in X-Signature."""
    defaults: Mapping[str, object] = {"header": "X-Signature"} if scheme == "hmac" else {}
    secrets: Mapping[str, object] = {} if scheme == "none" else {"secrets": [SECRET]}
    merged = {"scheme": scheme, **defaults, **secrets, **config}
    return build_verifier({key: value for key, value in merged.items() if value is not None}, public_url=public_url)


def refusal(verifier: Verifier, request: Request, *, now: float = NOW) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        verifier.verify(request, now=now)
    assert caught.value.status == 401
    return caught.value


def reason(verifier: Verifier, request: Request, *, now: float = NOW, keys: KeyCache | None = None) -> str:
    """Return why a request is refused, `accepted` if it isn't, or which key is needed."""
    try:
        verifier.verify(request, now=now, keys=keys)
    except RefusedError as error:
        return error.reason
    except KeyNeededError as error:
        return error.url
    return "accepted"


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
