"""Keys that a request names by an address: which addresses are good, what is kept, and for how long."""

import base64
import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import RefusedError
from gateway.verify.presets import PRESETS, SchemeError
from gateway.verify.remote_keys import (
    FRESH,
    MAX_FAILURES,
    MAX_KEYS,
    PAUSE,
    USABLE,
    KeyCache,
    KeyLocations,
    KeyNeededError,
    is_host,
    read_document,
)
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import BODY, NOW, a_request, reason, refusal
from tests.verify.vectors import Vector, vectors

URL = "https://keys.example.com/v1/a.pem"


_generate = cache(lambda _: rsa.generate_private_key(65537, 2048))


def the_key(name: str = "ours") -> rsa.RSAPrivateKey:
    """Return the private key of that name, always the same."""
    return _generate(name)


def a_certificate(
    key: Any, *, since: float = NOW - 86400, until: float = NOW + 86400, signer: Any | None = None
) -> bytes:
    name = x509.Name([])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(datetime.fromtimestamp(since, UTC))
    builder = builder.not_valid_after(datetime.fromtimestamp(until, UTC))
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(Encoding.PEM)


def a_public_key(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def a_remote_verifier(**config: object) -> Verifier:
    key_url = {"header": "X-Key-Url", "hosts": ["keys.example.com"], "path": "/v1/"}
    return build_verifier(
        {"scheme": "public-key", "algorithm": "rsa-sha256", "header": "X-S", "encoding": "base64", "key_url": key_url}
        | config
    )


def signed(url: str = URL, *, key: str = "ours", body: bytes = BODY) -> Request:
    signature = the_key(key).sign(body, padding.PKCS1v15(), hashes.SHA256())
    return a_request([("X-S", base64.b64encode(signature)), ("X-Key-Url", url)], body=body)


def known(document: bytes | None = None, url: str = URL) -> KeyCache:
    keys = KeyCache()
    keys.keep(url, a_certificate(the_key()) if document is None else document, NOW)
    return keys


# ---- Verification ----


def test_a_key_is_needed_once_and_then_verifies() -> None:
    verifier = a_remote_verifier()
    assert reason(verifier, signed(), keys=KeyCache()) == URL
    assert reason(verifier, signed(), keys=None) == URL
    for document in (a_certificate(the_key()), a_public_key(the_key())):
        keys = known(document)
        assert reason(verifier, signed(), keys=keys) == "accepted"
        assert reason(verifier, signed()._replace(body=BODY + b" "), keys=keys) == "bad_signature"
        assert reason(verifier, signed(key="another"), keys=keys) == "bad_signature"


def test_nothing_is_needed_for_what_is_refused_anyway() -> None:
    verifier = a_remote_verifier()
    assert reason(verifier, a_request([("X-Key-Url", URL)])) == "missing_signature"
    assert reason(verifier, a_request([("X-Key-Url", URL), ("X-S", "abc")])) == "malformed_signature"


@pytest.mark.parametrize("url", [
    "", "/", "http://keys.example.com/v1/a", "https://keys.example.com/v2/a", "https://keys.example.com/v1/",
    "https://keys.example.com.evil.com/v1/a", "https://evil.com/keys.example.com/v1/a",
    "https://evilkeys.example.com/v1/a", "https://a.keys.example.com/v1/a", "https://KEYS.example.com/v1/a",
    "https://keys.example.com:443/v1/a", "https://keys.example.com:8443/v1/a", "https://me@keys.example.com/v1/a",
    "https://me:pw@keys.example.com/v1/a", "https://keys.example.com\\@evil.com/v1/a", "https://keys.example.com./v1/a",
    "https://keys.example.com/v1/../v2/a", "https://keys.example.com/v1/./a", "https://keys.example.com/v1//a",
    "https://keys.example.com/v1/%2e%2e/a", "https://keys.example.com/v1/a?x=1", "https://keys.example.com/v1/a#b",
    "https://keys.example.com/v1/a\n", " https://keys.example.com/v1/a", "https://keys.example.com/v1/é",
    "https://keysXexample.com/v1/a", "//keys.example.com/v1/a", f"https://keys.example.com/v1/{'a' * 500}", "file:///v1/a",
])  # fmt: skip
def test_another_address_is_refused_and_not_asked(url: str) -> None:
    assert reason(a_remote_verifier(), signed(url), keys=KeyCache()) == "bad_key"


def test_a_path_alone_is_the_first_hosts() -> None:
    places = KeyLocations(hosts=("a.example.com", "b.example.com"), path="/keys/")
    assert places.url(b"/keys/x") == "https://a.example.com/keys/x"
    assert places.url(b"https://b.example.com/keys/x") == "https://b.example.com/keys/x"
    for bad in (b"/other/x", b"//keys/x", b"/keys/../x"):
        with pytest.raises(RefusedError):
            places.url(bad)


def test_a_star_is_one_label() -> None:
    places = KeyLocations(hosts=("*.example.com",))
    assert places.url(b"https://api-2.example.com/x") == "https://api-2.example.com/x"
    for host in (b"example.com", b"a.b.example.com", b".example.com", b"-.example.com", b"a/.example.com"):
        with pytest.raises(RefusedError):
            places.url(b"https://" + host + b"/x")


def test_which_hosts_may_be_listed() -> None:
    assert all(is_host(host) for host in ("example.com", "api.example.com", "*.example.com", "sns.*.example.com"))
    assert not any(
        is_host(host) for host in ("*.com", "*", "com", "example.*", "Example.com", "a*.example.com", "1.2.3.4")
    )


def test_the_address_is_in_one_header_or_a_field() -> None:
    two = signed()._replace(headers=(*signed().headers, (b"x-key-url", URL.encode())))
    assert reason(a_remote_verifier(), two) == "bad_key"
    assert reason(a_remote_verifier(), a_request([signed().headers[0]])) == "bad_key"
    verifier = a_remote_verifier(key_url={"field": "key.url", "hosts": ["keys.example.com"]})
    body = json.dumps({"key": {"url": URL}}).encode()
    assert reason(verifier, signed(body=body)) == URL
    assert reason(verifier, signed(body=b"{}")) == "bad_key"


def test_a_certificate_is_good_between_its_dates() -> None:
    verifier = a_remote_verifier()
    for since, until, expected in (
        (NOW - 1, NOW + 1, "accepted"),
        (NOW + 1, NOW + 2, "bad_key"),
        (NOW - 2, NOW - 1, "bad_key"),
    ):
        assert reason(verifier, signed(), keys=known(a_certificate(the_key(), since=since, until=until))) == expected


def test_a_key_of_another_kind_is_refused() -> None:
    elliptic, small = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 1024)
    for document in (a_public_key(elliptic), a_public_key(small), a_certificate(small, signer=the_key())):
        error = refusal_with(known(document))
        assert (error.status, error.reason) == (401, "bad_key")


def refusal_with(keys: KeyCache) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        a_remote_verifier().verify(signed(), now=NOW, keys=keys)
    return caught.value


def test_a_key_that_cant_be_had_is_no_fault_of_the_senders() -> None:
    keys = KeyCache()
    keys.fail(URL, NOW)
    error = refusal_with(keys)
    assert (error.status, error.reason) == (503, "key_unavailable")


# ---- What is kept ----


def is_needed(keys: KeyCache, now: float, url: str = URL) -> bool:
    try:
        keys.get(url, now)
    except KeyNeededError as needed:
        return needed.url == url
    return False


def test_a_key_is_asked_for_again_after_an_hour() -> None:
    keys = known()
    assert not is_needed(keys, NOW + FRESH - 1)
    assert is_needed(keys, NOW + FRESH)
    assert is_needed(keys, NOW - 1)  # the clock was set back
    keys.keep(URL, a_certificate(the_key()), NOW + FRESH)
    assert not is_needed(keys, NOW + FRESH)


def test_an_address_that_failed_is_left_alone_for_a_while() -> None:
    keys = KeyCache()
    keys.fail(URL, NOW)
    with pytest.raises(RefusedError, match="key_unavailable"):
        keys.get(URL, NOW + PAUSE - 1)
    assert is_needed(keys, NOW + PAUSE)


def test_a_known_key_is_used_while_its_address_fails_but_not_for_ever() -> None:
    keys = known()
    keys.fail(URL, NOW + FRESH)
    assert not is_needed(keys, NOW + FRESH)
    keys.fail(URL, NOW + USABLE)
    with pytest.raises(RefusedError, match="key_unavailable"):
        keys.get(URL, NOW + USABLE)


def test_a_key_that_is_gone_is_forgotten() -> None:
    keys = known()
    keys.fail(URL, NOW + FRESH, is_gone=True)
    with pytest.raises(RefusedError, match="key_unavailable"):
        keys.get(URL, NOW + FRESH)


def test_an_address_is_known_once_it_has_given_a_key() -> None:
    keys = known()
    keys.fail(f"{URL}x", NOW)
    assert (keys.knows(URL), keys.knows(f"{URL}x")) == (True, False)
    keys.fail(URL, NOW)
    assert keys.knows(URL)
    keys.fail(URL, NOW, is_gone=True)
    assert not keys.knows(URL)


def test_the_least_used_make_room() -> None:
    keys, document = known(), a_public_key(the_key())
    for n in range(MAX_KEYS - 1):
        keys.keep(f"{URL}{n}", document, NOW)
    keys.get(URL, NOW)
    keys.keep(f"{URL}more", document, NOW)
    assert len(keys.urls) == MAX_KEYS
    assert URL in keys.urls
    assert f"{URL}0" not in keys.urls


def test_addresses_that_strangers_make_up_take_nothing_from_a_known_key() -> None:
    keys = known()
    for n in range(3 * MAX_FAILURES):
        keys.fail(f"{URL}{n}", NOW)
    assert len(keys._failures) == MAX_FAILURES
    assert reason(a_remote_verifier(), signed(), keys=keys) == "accepted"


def test_a_document_without_a_key_changes_nothing() -> None:
    keys = known()
    for document in (b"", b"<html>busy</html>", a_certificate(the_key())[:-40]):
        with pytest.raises(ValueError):  # noqa: PT011 - the library's own
            keys.keep(URL, document, NOW + FRESH)
    assert reason(a_remote_verifier(), signed(), keys=keys) == "accepted"


@given(data=st.binary(), label=st.sampled_from(["CERTIFICATE", "PUBLIC KEY", "RSA PUBLIC KEY", ""]))
def test_no_document_crashes_the_reader(data: bytes, label: str) -> None:
    text = base64.b64encode(data).decode()
    document = f"-----BEGIN {label}-----\n{text}\n-----END {label}-----\n".encode() if label else data
    with suppress(ValueError):
        read_document(document)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_damaged_certificate_crashes_the_reader() -> None:
    whole = x509.load_pem_x509_certificate(a_certificate(the_key())).public_bytes(Encoding.DER)
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        with suppress(ValueError):
            read_document(
                b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(damaged) + b"-----END CERTIFICATE-----\n"
            )


@given(text=st.one_of(st.binary(max_size=600), st.from_regex(r"https://keys\.example\.com/v1/[ -~]*").map(str.encode)))
def test_what_is_asked_is_below_the_path_of_a_listed_host(text: bytes) -> None:
    try:
        url = KeyLocations(hosts=("keys.example.com",), path="/v1/").url(text)
    except RefusedError:
        return
    assert url.startswith("https://keys.example.com/v1/")
    assert not set("%?#@\\ ") & set(url)
    assert ".." not in url.split("/")


# ---- Two signing methods, and providers ----


def test_either_of_two_keys_will_do_and_each_is_asked_for() -> None:
    verifier = a_twofold_verifier()
    other = URL.replace("a.pem", "b.pem")
    request = twice_signed(other)
    keys = KeyCache()
    assert reason(verifier, request, keys=keys) == URL
    keys.fail(URL, NOW)
    assert reason(verifier, request, keys=keys) == other
    keys.keep(other, a_public_key(the_key("another")), NOW)
    assert reason(verifier, request, keys=keys) == "accepted"
    keys = known(a_public_key(the_key("another")))
    keys.fail(other, NOW)
    assert reason(verifier, request, keys=keys) == "key_unavailable"


def a_twofold_verifier() -> Verifier:
    """Build a verifier of two signatures with a key for each; only a provider's file has such."""
    key_urls = [{"header": f"X-Key-{n}", "hosts": ["keys.example.com"]} for n in (1, 2)]
    verifiers = [a_remote_verifier(header=f"X-S-{n}", key_url=url) for n, url in enumerate(key_urls, 1)]
    checks = tuple([verifier.checks[0] for verifier in verifiers])
    return replace(verifiers[0], checks=checks, ids=(None, None))


def twice_signed(other: str) -> Request:
    one, two = signed(), signed(other, key="another")
    return a_request([
        ("X-S-1", one.headers[0][1]), ("X-Key-1", URL), ("X-S-2", two.headers[0][1]), ("X-Key-2", other),
    ])  # fmt: skip


def the_vector(scheme: str) -> Vector:
    return next(vector for vector in vectors() if vector.scheme == scheme)


def test_paypal_asks_for_the_webhooks_id_which_is_signed() -> None:
    vector = the_vector("paypal")
    with pytest.raises(SchemeError, match="expected the key 'webhook_id', got none"):
        build_verifier({"scheme": "paypal"})
    with pytest.raises(SchemeError, match=r"webhook_id: expected a string of visible ASCII characters, got 'a\|b'"):
        build_verifier({"scheme": "paypal", "webhook_id": "a|b"})
    other = vector.verifier(webhook_id="9XL90610J3647323D")
    assert reason(other, vector.request, now=vector.now, keys=vector.keys) == "bad_signature"
    assert other != vector.verifier()


@pytest.mark.parametrize("url", [
    "https://www.paypal.com/v1/notifications/certs/CERT-1", "https://api.paypal.com/v1/notifications/webhooks/CERT-1",
    "https://api.paypal.com.evil.com/v1/notifications/certs/CERT-1", "https://evil.com/v1/notifications/certs/CERT-1",
])  # fmt: skip
def test_paypals_certificates_are_at_one_place(url: str) -> None:
    vector = the_vector("paypal")
    headers = tuple((n, url.encode() if n == b"PAYPAL-CERT-URL" else v) for n, v in vector.request.headers)
    assert reason(vector.verifier(), vector.request._replace(headers=headers), now=vector.now) == "bad_key"


def test_a_users_own_template_cant_ask() -> None:
    with pytest.raises(SchemeError) as caught:
        a_remote_verifier(signed="{given:webhook_id}{body}")
    assert str(caught.value) == "verify.signed: expected no {given:…}, which only a provider's definition may have"


def test_a_provider_has_a_key_of_its_own_or_asks_for_one() -> None:
    for name, preset in PRESETS.items():
        for method in preset.methods:
            if method.scheme == "public-key":
                places = {"public_keys", "key_url"} & method.values.keys()
                assert len(places) <= 1, name
                if not places:
                    with pytest.raises(SchemeError, match="expected the key 'public_keys'"):
                        build_verifier({"scheme": name})


@pytest.mark.parametrize(
    ("key_url", "problem"),
    [
        ("x", "key_url: expected a mapping with header or field, and hosts, got 'x'"),
        ({"hosts": ["a.com"]}, "key_url: expected one of header, field, got none"),
        (
            {"header": "X", "field": "x", "hosts": ["a.com"]},
            "key_url: expected one of header, field, got header and field",
        ),
        ({"header": "X"}, "key_url: expected the key 'hosts', got none"),
        ({"header": "X", "hosts": "a.com"}, "key_url.hosts: expected a list of hosts in lower case, in which * stands"),
        (
            {"header": "X", "hosts": ["*.com"]},
            "key_url.hosts: expected a list of hosts in lower case, in which * stands",
        ),
        ({"header": "X", "hosts": ["a.com"], "path": "x"}, "key_url.path: expected what the path of an address starts"),
        (
            {"header": "X", "hosts": ["a.com"], "path": "/../"},
            "key_url.path: expected what the path of an address starts",
        ),
    ],
)
def test_where_keys_are_is_said_completely(key_url: object, problem: str) -> None:
    with pytest.raises(SchemeError) as caught:
        a_remote_verifier(key_url=key_url)
    assert str(caught.value).startswith(f"verify.{problem}")


def test_a_scheme_has_keys_or_their_address() -> None:
    with pytest.raises(SchemeError, match="expected one of public_keys, key_url, got public_keys and key_url"):
        a_remote_verifier(public_keys=[a_public_key(the_key()).decode()])


def test_a_refusal_names_the_places() -> None:
    assert refusal(a_remote_verifier(), signed("https://evil.com/v1/x")).detail == (
        "expected the key's address to be https://keys.example.com and a path in /v1/, got something else"
    )
