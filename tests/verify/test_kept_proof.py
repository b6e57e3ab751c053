"""What is kept of a refused request: enough to verify it again, and no credential."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from gateway.model import Headers, RefusedError
from gateway.verify.kept_proof import Concealed, conceal, is_body_secret, revealed, why_not_kept
from gateway.verify.request import MAX_PARAMETERS, Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier

NOW = 1_764_075_895.25
SALT = b"0123456789abcdef"
OLD, NEW = "an old secret of more than 32 bytes", "a new secret of more than 32 bytes"
BODY = b'{"id":"e1"}'

Scheme = Mapping[str, object]
SCHEMES: dict[str, Scheme] = {
    "github": {"scheme": "github"},
    "stripe": {"scheme": "stripe"},
    "a token in a header": {"scheme": "token", "header": "X-Token"},
    "a token in the query": {"scheme": "token", "query": "key"},
    "bearer": {"scheme": "bearer"},
    "basic": {"scheme": "basic", "username": "hooks"},
    "a signature in Authorization": {
        "scheme": "hmac",
        "header": "Authorization",
        "prefix": "HMAC ",
        "algorithm": "sha256",
        "encoding": "hex",
        "signed": "{body}",
        "secret_encoding": "raw",
    },
    "a token that covers the body": {"scheme": "jwt", "algorithms": ["HS256"], "claims": {"sha": "{body:sha256}"}},
}


def verifier_of(scheme: Scheme, secret: str) -> Verifier:
    return build_verifier({**scheme, "secrets": [secret]})


def signed_with(verifier: Verifier) -> Request:
    pairs = verifier.sign(BODY, now=NOW, id="e1", type="ping", headers={"Cookie": "session=1"})
    query = "&".join(filter(None, ["a=1", verifier.signed_query(now=NOW)]))
    headers = tuple([(name.encode(), value.encode()) for name, value in pairs])
    return Request("POST", "/in/x", query, headers, BODY)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_kept_is_verified_by_the_secret_it_was_signed_with_and_by_no_other(name: str) -> None:
    old, new = [verifier_of(SCHEMES[name], secret) for secret in (OLD, NEW)]
    sent = signed_with(new)
    with pytest.raises(RefusedError):
        old.verify(sent, now=NOW)
    kept = conceal(old, sent, SALT)
    assert kept.is_whole
    bare = sent._replace(headers=kept.headers, query=kept.query)
    again = revealed(new, bare, kept.credentials, SALT, now=NOW)
    assert new.verify(again, now=NOW).secret == 0
    with pytest.raises(RefusedError):
        old.verify(revealed(old, bare, kept.credentials, SALT, now=NOW), now=NOW)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_credential_is_kept(name: str) -> None:
    old, new = [verifier_of(SCHEMES[name], secret) for secret in (OLD, NEW)]
    sent = signed_with(new)
    kept = conceal(old, sent, SALT)
    written = b" ".join([b" ".join(map(b" ".join, kept.headers)), kept.query.encode(), repr(kept.credentials).encode()])
    carried = [value for key, value in sent.headers if key.lower() in {b"authorization", b"x-token"}]
    for secret in (NEW.encode(), b"session=1", NEW.replace(" ", "%20").encode()):
        assert secret not in written
    if name in {"bearer", "basic", "a token in a header"}:
        assert carried
        assert not any(value in written for value in carried)
    assert "a=1" in kept.query


def test_two_records_of_one_credential_are_not_alike() -> None:
    verifier = verifier_of(SCHEMES["bearer"], OLD)
    sent = signed_with(verifier_of(SCHEMES["bearer"], NEW))
    assert conceal(verifier, sent, SALT).credentials != conceal(verifier, sent, SALT[::-1]).credentials


@pytest.mark.parametrize(
    ("scheme", "secret"),
    [({"scheme": "bearer"}, "hunter2"), ({"scheme": "basic", "username": "a-user-with-a-long-name"}, "hunter2")],
)
def test_nothing_is_kept_of_a_credential_that_could_be_guessed(scheme: Scheme, secret: str) -> None:
    kept = conceal(verifier_of(scheme, OLD), signed_with(verifier_of(scheme, secret)), SALT)
    assert kept.credentials == ()
    assert not kept.is_whole


def test_a_credential_is_hidden_where_another_method_has_its_signature() -> None:
    verifier = verifier_of(SCHEMES["a signature in Authorization"], OLD)
    bearer = verifier_of(SCHEMES["bearer"], OLD)
    both = replace(verifier, checks=(*verifier.checks, *bearer.checks), ids=(None, None))
    sent = Request("POST", "/", "", ((b"Authorization", b"Bearer " + NEW.encode()),), BODY)
    assert conceal(both, sent, SALT).headers == ()


def test_nothing_is_kept_of_a_query_of_more_parameters_than_are_looked_at() -> None:
    both = verifier_of(SCHEMES["a token in the query"], OLD)
    query = f"key={NEW}" + "&a" * MAX_PARAMETERS
    kept = conceal(both, Request("POST", "/", query, (), BODY), SALT)
    assert kept == Concealed((), "", (), is_whole=False)


def test_a_token_that_is_good_for_any_body_is_not_kept() -> None:
    bare = build_verifier({"scheme": "jwt", "algorithms": ["HS256"], "claims": {}, "secrets": [OLD]})
    assert why_not_kept(bare)
    assert why_not_kept(build_verifier({"scheme": "none"}))
    for scheme in SCHEMES.values():
        assert why_not_kept(verifier_of(scheme, OLD)) == ""


def test_a_credential_in_the_body_is_known_to_be_there() -> None:
    verifier = build_verifier({"scheme": "token", "field": "token", "secrets": [OLD]})
    assert is_body_secret(verifier)
    sent = Request("POST", "/", "", (), json.dumps({"token": NEW}).encode())
    kept = conceal(verifier, sent, SALT)
    assert kept.is_whole
    assert kept.credentials == ()


@pytest.mark.parametrize(
    ("scheme", "headers"),
    [
        ({"scheme": "hmac", "header": "X-S", "signed": "{header:Authorization}.{body}"}, ()),
        ({"scheme": "contentful"}, ((b"X-Contentful-Signed-Headers", b"X-Contentful-Signed-Headers,Authorization"),)),
        (
            {"scheme": "http-message-signature", "algorithm": "hmac-sha256", "covered": ["authorization"]},
            ((b"Signature-Input", b'sig1=("content-digest" "authorization");created=1'),),
        ),
    ],
    ids=["by the rules", "by a list", "by a message signature"],
)
def test_a_credential_that_is_signed_is_not_kept_and_its_request_is_not_whole(scheme: Scheme, headers: Headers) -> None:
    verifier = build_verifier({**scheme, "secrets": ["ab" * 32]}, public_url="https://hooks.example/in/x")
    credential = (b"Authorization", b"Bearer " + NEW.encode())
    for more, is_whole in (((credential,), False), ((), True)):
        kept = conceal(verifier, Request("POST", "/", "", (*headers, *more), BODY), SALT)
        assert (kept.headers, kept.is_whole) == (headers, is_whole)


def test_a_credential_that_is_not_signed_leaves_its_request_whole() -> None:
    """A list may mention others than what was there."""
    verifier = build_verifier({"scheme": "contentful", "secrets": ["ab" * 32]})
    listed = (b"X-Contentful-Signed-Headers", b"x-contentful-signed-headers,x-a")
    kept = conceal(verifier, Request("POST", "/", "", (listed, (b"Cookie", b"session=1")), BODY), SALT)
    assert (kept.headers, kept.is_whole) == ((listed,), True)
