"""HTTP Message Signatures, against the examples of RFC 9421 (appendices B.2 to B.4) and of RFC 9530."""

import base64
import hashlib
import hmac
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.model import UsageError
from gateway.verify.kept_proof import conceal
from gateway.verify.message_signatures import ALGORITHMS, MAX_FIELD_BYTES, MAX_SIGNATURES
from gateway.verify.presets import SchemeError
from gateway.verify.remote_keys import PAUSE, KeyCache
from gateway.verify.request import MAX_PARAMETERS, Request
from gateway.verify.verifier import Verifier
from tests.machine_speed import as_usual
from tests.verify.signed_requests import NOW, a_request, a_verifier, reason, refusal
from tests.verify.test_vectors import flip

if TYPE_CHECKING:
    from collections.abc import Mapping

CREATED = 1618884473.0
URL = "https://example.com/foo"
RSA_PSS = """-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAr4tmm3r20Wd/PbqvP1s2
+QEtvpuRaV8Yq40gjUR8y2Rjxa6dpG2GXHbPfvMs8ct+Lh1GH45x28Rw3Ry53mm+
oAXjyQ86OnDkZ5N8lYbggD4O3w6M6pAvLkhk95AndTrifbIFPNU8PPMO7OyrFAHq
gDsznjPFmTOtCEcN2Z1FpWgchwuYLPL+Wokqltd11nqqzi+bJ9cvSKADYdUAAN5W
Utzdpiy6LbTgSxP7ociU4Tn0g5I6aDZJ7A8Lzo0KSyZYoA485mqcO0GVAdVw9lq4
aOT9v6d+nb4bnNkQVklLQ3fVAvJm+xdDOp9LCNCN48V2pnDOkFV6+U9nV5oyc6XI
2wIDAQAB
-----END PUBLIC KEY-----
"""
P256 = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqIVYZVLCrPZHGHjP17CTW0/+D9Lf
w0EkjqF7xB4FivAxzic30tMM4GF+hR6Dxh71Z50VGGdldkkDXZCnTNnoXQ==
-----END PUBLIC KEY-----
"""
ED25519 = "JrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs="
SHARED = "uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
"""The keys of appendix B.1."""
BODY = b'{"hello": "world"}'
DIGEST = "sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:"
HEADERS = {
    "Host": "example.com",
    "Date": "Tue, 20 Apr 2021 02:07:55 GMT",
    "Content-Type": "application/json",
    "Content-Digest": DIGEST,
    "Content-Length": "18",
}
MINIMAL = (
    'sig-b21=();created=1618884473;keyid="test-key-rsa-pss";nonce="b3k2pp5k7z-50gnwp.yemd"',
    (
        "sig-b21=:d2pmTvmbncD3xQm8E9ZV2828BjQWGgiwAaw5bAkgibUopemLJcWDy/lkbbHAve4cRAtx31Iq786U7it++wgGxbtRxf8Udx7zFZsckzXaJ"
        "MkA7ChG52eSkFxykJeNqsrWH5S+oxNFlD4dzVuwe8DhTSja8xxbR/Z2cOGdCbzR72rgFWhzx2VjBqJzsPLMIQKhO4DGezXehhWwE56YCE+O6c0mKZs"
        "fxVrogUvA4HELjVKWmAvtl6UnCh8jYzuVG5WSb/QEVPnP5TmcAnLH1g+s++v6d4s8m0gCw1fV5/SITLq9mhho8K3+7EPYTU8IU1bLhdxO5Nyt8C8ss"
        "inQ98Xw9Q==:"
    ),
)
SELECTIVE = (
    (
        'sig-b22=("@authority" "content-digest" "@query-param";name="Pet");created=1618884473;keyid="test-key-rsa-pss"'
        ';tag="header-example"'
    ),
    (
        "sig-b22=:LjbtqUbfmvjj5C5kr1Ugj4PmLYvx9wVjZvD9GsTT4F7GrcQEdJzgI9qHxICagShLRiLMlAJjtq6N4CDfKtjvuJyE5qH7KT8UCMkSowOB4"
        "+ECxCmT8rtAmj/0PIXxi0A0nxKyB09RNrCQibbUjsLS/2YyFYXEu4TRJQzRw1rLEuEfY17SARYhpTlaqwZVtR8NV7+4UKkjqpcAoFqWFQh62s7Cl+H2"
        "fjBSpqfZUJcsIk4N6wiKYd4je2U/lankenQ99PZfB4jY3I5rSV2DSBVkSFsURIjYErOs0tFTQosMTAoxk//0RoKUqiYY8Bh0aaUEb0rQl3/XaVe4bXT"
        "ugEjHSw==:"
    ),
)
FULL = (
    (
        'sig-b23=("date" "@method" "@path" "@query" "@authority" "content-type" "content-digest" "content-length")'
        ';created=1618884473;keyid="test-key-rsa-pss"'
    ),
    (
        "sig-b23=:bbN8oArOxYoyylQQUU6QYwrTuaxLwjAC9fbY2F6SVWvh0yBiMIRGOnMYwZ/5MR6fb0Kh1rIRASVxFkeGt683+qRpRRU5p2voTp768ZrCU"
        "b38K0fUxN0O0iC59DzYx8DFll5GmydPxSmme9v6ULbMFkl+V5B1TP/yPViV7KsLNmvKiLJH1pFkh/aYA2HXXZzNBXmIkoQoLd7YfW91kE9o/CCoC1x"
        "My7JA1ipwvKvfrs65ldmlu9bpG6A9BmzhuzF8Eim5f8ui9eH8LZH896+QIF61ka39VBrohr9iyMUJpvRX2Zbhl5ZJzSRxpJyoEZAFL2FUo5fTIztsDZ"
        "KEgM4cUA==:"
    ),
)
BY_SECRET = (
    'sig-b25=("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"',
    "sig-b25=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:",
)
BY_ED25519 = (
    (
        'sig-b26=("date" "@method" "@path" "@authority" "content-type" "content-length")'
        ';created=1618884473;keyid="test-key-ed25519"'
    ),
    "sig-b26=:wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==:",
)


def the_request(inputs: str, signature: str, *, body: bytes = BODY, **more: str) -> Request:
    """Return the request of appendix B.2 with a signature, and other headers."""
    pairs = {**HEADERS, **{name.replace("_", "-"): value for name, value in more.items()}}
    headers = (*pairs.items(), ("Signature-Input", inputs), ("Signature", signature))
    return a_request(headers, body=body, query="param=Value&Pet=dog", path="/foo")


def checking(algorithm: str = "rsa-pss-sha512", **config: Any) -> Verifier:
    keys: Mapping[str, Mapping[str, Any]] = {
        "hmac-sha256": {"secrets": [SHARED], "secret_encoding": "base64"},
        "rsa-pss-sha512": {"public_keys": [RSA_PSS]},
        "ed25519": {"public_keys": [ED25519]},
        "ecdsa-p256-sha256": {"public_keys": [P256]},
    }
    given: Mapping[str, Any] = {"secrets": None, "public_url": URL, **keys.get(algorithm, {}), **config}
    return a_verifier("http-message-signature", algorithm=algorithm, **given)


# ---- The examples of the RFC ----


def test_the_example_of_full_coverage_is_accepted() -> None:
    """Appendix B.2.3, with the default of what must be covered."""
    assert reason(checking(), the_request(*FULL), now=CREATED) == "accepted"
    assert reason(checking(public_url="https://example.com"), the_request(*FULL), now=CREATED) == "accepted"
    assert reason(checking(public_url="https://EXAMPLE.com:443/foo"), the_request(*FULL), now=CREATED) == "accepted"


def test_the_example_of_selected_components_is_accepted() -> None:
    """Appendix B.2.2."""
    verifier = checking(covered=["@authority", '@query-param;name="Pet"'], tag="header-example")
    assert reason(verifier, the_request(*SELECTIVE), now=CREATED) == "accepted"
    for query in ("Pet=cat", "pet=dog", "Pet=dog&Pet=dog", ""):
        assert reason(verifier, the_request(*SELECTIVE)._replace(query=query), now=CREATED) != "accepted"


@pytest.mark.parametrize(
    ("algorithm", "signed", "covered"),
    [
        ("hmac-sha256", BY_SECRET, ["date", "@authority", "content-type"]),
        ("ed25519", BY_ED25519, ["@method", "@path", "content-length"]),
    ],
)
def test_examples_that_leave_the_body_out_verify_but_for_that(
    algorithm: str, signed: tuple[str, str], covered: list[str]
) -> None:
    """Appendices B.2.5 and B.2.6: nothing vouches for the body, so that there may be none."""
    verifier = checking(algorithm, covered=covered)
    assert reason(verifier, the_request(*signed, body=b""), now=CREATED) == "accepted"
    assert "covers content-digest" in refusal(verifier, the_request(*signed), now=CREATED).detail
    assert reason(verifier, the_request(*signed, body=b"", Date="now"), now=CREATED) == "bad_signature"


def test_the_example_that_covers_nothing_is_refused() -> None:
    """Appendix B.2.1."""
    expected = (
        "expected a signature that covers @method, @target-uri or @authority and @path and @query, got something else"
    )
    assert refusal(checking(), the_request(*MINIMAL), now=CREATED).detail == expected


def test_the_example_of_a_proxy_is_accepted() -> None:
    """Appendix B.3, by ECDSA."""
    certificate = (
        ":MIIBqDCCAU6gAwIBAgIBBzAKBggqhkjOPQQDAjA6MRswGQYDVQQKDBJMZXQncyBBdXRoZW50aWNhdGUxGzAZBgNVBAMMEkxBIEludGVybWVkaWF0Z"
        "SBDQTAeFw0yMDAxMTQyMjU1MzNaFw0yMTAxMjMyMjU1MzNaMA0xCzAJBgNVBAMMAkJDMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE8YnXXfaUgmnM"
        "tOXU/IncWalRhebrXmckC8vdgJ1p5Be5F/3YC8OthxM4+k1M6aEAEFcGzkJiNy6J84y7uzo9M6NyMHAwCQYDVR0TBAIwADAfBgNVHSMEGDAWgBRm3WjL"
        "a38lbEYCuiCPct0ZaSED2DAOBgNVHQ8BAf8EBAMCBsAwEwYDVR0lBAwwCgYIKwYBBQUHAwIwHQYDVR0RAQH/BBMwEYEPYmRjQGV4YW1wbGUuY29tMAoG"
        "CCqGSM49BAMCA0gAMEUCIBHda/r1vaL6G3VliL4/Di6YK0Q6bMjeSkC3dFCOOB8TAiEAx/kHSB4urmiZ0NX5r5XarmPk0wmuydBVoU4hBVZ1yhk=:"
    )
    request = the_request(
        'ttrp=("@path" "@query" "@method" "@authority" "client-cert");created=1618884473;keyid="test-key-ecc-p256"',
        "ttrp=:xVMHVpawaAC/0SbHrKRs9i8I3eOs5RtTMGCWXm/9nvZzoHsIg6Mce9315T6xoklyy0yzhD9ah4JHRwMLOgmizw==:",
        body=b"",
        Client_Cert=certificate,
    )
    verifier = checking("ecdsa-p256-sha256", public_url="https://service.internal.example/foo")
    assert reason(verifier, request, now=CREATED) == "accepted"
    assert reason(checking("ecdsa-p256-sha256"), request, now=CREATED) == "bad_signature"  # of another host


@pytest.mark.parametrize(
    ("accept", "query", "method", "expected"),
    [
        (["application/json", "*/*"], "name1=Value1&Name2=value2", "GET", "accepted"),
        (["application/json, */*"], "name1=Value1&Name2=value2&param=added", "GET", "accepted"),
        (["  application/json", "*/*  "], "", "GET", "accepted"),
        (["*/*", "application/json"], "", "GET", "bad_signature"),
        (["application/json", "*/*"], "", "POST", "bad_signature"),
    ],
)
def test_the_examples_of_transformed_messages(accept: list[str], query: str, method: str, expected: str) -> None:
    """Appendix B.4."""
    inputs = (
        'transform=("@method" "@path" "@authority" "accept");created=1618884473;keyid="test-key-ed25519"',
        "transform=:ZT1kooQsEHpZ0I1IjCqtQppOmIqlJPeo7DHR3SoMn0s5JZ1eRGS0A+vyYP9t/LXlh5QMFFQ6cpLt2m0pmj3NDA==:",
    )
    pairs = [*[("Accept", each) for each in accept], ("Signature-Input", inputs[0]), ("Signature", inputs[1])]
    request = a_request(pairs, body=b"", query=query, path="/demo")._replace(method=method)
    verifier = checking("ed25519", public_url="https://example.org/demo", covered=["@method", "accept"])
    assert reason(verifier, request, now=CREATED) == expected


# ---- What is refused ----


def test_any_changed_byte_is_refused() -> None:
    """Of the signature, of what describes it, of each covered header, of the address and of the body."""
    verifier, request = checking(), the_request(*FULL)
    for index, (name, value) in enumerate(request.headers):
        if name != b"Host":
            for at in range(len(value)):
                headers = (*request.headers[:index], (name, flip(value, at)), *request.headers[index + 1 :])
                assert reason(verifier, request._replace(headers=headers), now=CREATED) != "accepted", (name, at)
    for at in range(len(BODY)):
        assert reason(verifier, request._replace(body=flip(BODY, at)), now=CREATED) == "bad_signature"
    for changed in (
        request._replace(method="PUT"),
        request._replace(query="param=Value&Pet=dox"),
        request._replace(query=""),
        request._replace(body=b""),
    ):
        assert reason(verifier, changed, now=CREATED) != "accepted"
    by_path = checking(public_url="https://example.com")
    assert reason(by_path, request._replace(path="/fox"), now=CREATED) == "bad_signature"


SECRET_KEY = base64.b64decode(SHARED)


def signed(
    *components: str, body: bytes = BODY, parameters: str = f";created={int(NOW)}", query: str = "", **headers: str
) -> Request:
    """Return a request that is signed by the RFC's text alone; a component is `"name": value` or a bare name."""
    pairs = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    pairs.setdefault("content-digest", f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:")
    known = {"@method": "POST", "@target-uri": URL, "@authority": "example.com", "@path": "/foo", **pairs}
    lines = [each if each.startswith('"') else f'"{each}": {known[each]}' for each in components]
    described = f"({' '.join([line.partition(': ')[0] for line in lines])}){parameters}"
    base = "\n".join([*lines, f'"@signature-params": {described}'])
    signature = base64.b64encode(hmac.digest(SECRET_KEY, base.encode(), "sha256")).decode()
    more = {"signature-input": f"sig1={described}", "signature": f"sig1=:{signature}:"}
    return a_request({**pairs, **more}.items(), body=body, query=query, path="/foo")


DEFAULT = ("@method", "@target-uri", "content-digest")


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        (DEFAULT, "accepted"),
        (("content-digest", "@path", "@authority", "@method"), "accepted"),
        (("@target-uri", "content-digest"), "bad_signature"),
        (("@method", "@path", "content-digest"), "bad_signature"),
        (("@method", "@authority", "content-digest"), "bad_signature"),
        (("@method", "@target-uri"), "bad_signature"),
        ((*DEFAULT, "@method"), "malformed_signature"),
        ((*DEFAULT, '"@scheme": https'), "accepted"),
        ((*DEFAULT, '"@request-target": /foo'), "accepted"),
        ((*DEFAULT, '"@query": ?'), "accepted"),
        ((*DEFAULT, '"@status": 200'), "malformed_signature"),
        ((*DEFAULT, '"@method";req: POST'), "malformed_signature"),
        ((*DEFAULT, '"x-a";sf: 1'), "malformed_signature"),
        ((*DEFAULT, '"x-a";tr: 1'), "malformed_signature"),
        ((*DEFAULT, '"x-a";bs;key="a": 1'), "malformed_signature"),
        ((*DEFAULT, '"X-A": 1'), "malformed_signature"),
        ((*DEFAULT, '"x-b": 1'), "missing_header"),
        ((*DEFAULT, '"x-a": a=1, b=2;x;y=?0, c=(1   "d")'), "accepted"),
        ((*DEFAULT, '"x-a";bs: :YT0xLCBiPTI7eDt5PT8wLCBjPSgxICAgImQiKQ==:'), "accepted"),
        ((*DEFAULT, '"x-a";key="b": 2;x;y=?0'), "accepted"),
        ((*DEFAULT, '"x-a";key="c": (1 "d")', '"x-a";key="a": 1'), "accepted"),
        ((*DEFAULT, '"x-a";key="z": 1'), "missing_header"),
        ((*DEFAULT, '"@query-param";name="a": 1'), "missing_header"),
    ],
)
def test_components_and_what_has_to_be_covered(components: tuple[str, ...], expected: str) -> None:
    request = signed(*components, X_A='a=1, b=2;x;y=?0, c=(1   "d")')
    assert reason(checking("hmac-sha256"), request) == expected


def test_a_query_must_be_covered_too() -> None:
    verifier = checking("hmac-sha256")
    parts = ("@method", "@authority", "@path", "content-digest")
    assert reason(verifier, signed(*parts, query="a=1")) == "bad_signature"
    assert reason(verifier, signed(*parts, '"@query": ?a=1', query="a=1")) == "accepted"
    whole = ("@method", f'"@target-uri": {URL}?a=1', "content-digest")
    assert reason(verifier, signed(*whole, query="a=1")) == "accepted"
    assert reason(verifier, signed(*whole, query="a=2")) == "bad_signature"


@pytest.mark.parametrize(
    ("query", "name", "value"),
    [
        ("var=this%20is%20a%20big%0Amultiline%20value", "var", "this%20is%20a%20big%0Amultiline%20value"),
        ("bar=with+plus+whitespace", "bar", "with%20plus%20whitespace"),
        ("fa%C3%A7ade%22%3A%20=something", "fa%C3%A7ade%22%3A%20", "something"),
        ("a=*-._~", "a", "*-._%7E"),
        ("baz=batman&qux=", "qux", ""),
    ],
)
def test_query_parameters_are_encoded_in_one_way(query: str, name: str, value: str) -> None:
    """Section 2.2.8, with its examples."""
    component = f'@query-param;name="{name}"'
    verifier = checking("hmac-sha256", covered=[component])
    line = f'"@query-param";name="{name}": {value}'
    assert reason(verifier, signed("content-digest", line, query=query)) == "accepted"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("", "missing_timestamp"),
        (f";created={int(NOW) - 300}", "accepted"),
        (f";created={int(NOW) - 301}", "stale_timestamp"),
        (f";created={int(NOW) + 300}", "accepted"),
        (f";created={int(NOW) + 301}", "stale_timestamp"),
        (f";created={int(NOW)};expires={int(NOW)}", "accepted"),
        (f";created={int(NOW)};expires={int(NOW) - 1}", "stale_timestamp"),
        (f";created={int(NOW)}.5", "malformed_timestamp"),
        (f";created=@{int(NOW)}", "malformed_timestamp"),
        (f';created="{int(NOW)}"', "malformed_timestamp"),
        (f";created={int(NOW)};expires=never", "malformed_timestamp"),
        (f';created={int(NOW)};alg="hmac-sha256";nonce="n";x=1', "accepted"),
        (f';created={int(NOW)};alg="ed25519"', "malformed_signature"),
        (f";created={int(NOW)};alg=hmac-sha256", "malformed_signature"),
        (f";created={int(NOW)};keyid=1", "malformed_signature"),
        (f';created={int(NOW)};keyid="{"k" * 257}"', "malformed_signature"),
        (f';created={int(NOW)};tag="{"k" * 257}"', "malformed_signature"),
    ],
)
def test_what_a_signature_says_of_itself(parameters: str, expected: str) -> None:
    assert reason(checking("hmac-sha256"), signed(*DEFAULT, parameters=parameters)) == expected


def test_without_a_tolerance_its_age_does_not_matter() -> None:
    verifier = checking("hmac-sha256", tolerance="none")
    for parameters in ("", ";created=1", f";created={int(NOW) + 999}"):
        assert reason(verifier, signed(*DEFAULT, parameters=parameters)) == "accepted"


DIGESTS = {
    "sha-256": base64.b64encode(hashlib.sha256(BODY).digest()).decode(),
    "sha-512": base64.b64encode(hashlib.sha512(BODY).digest()).decode(),
    "md5": base64.b64encode(hashlib.md5(BODY, usedforsecurity=False).digest()).decode(),
}


@pytest.mark.parametrize(
    ("digest", "expected"),
    [
        (f"sha-512=:{DIGESTS['sha-512']}:", "accepted"),
        (f"md5=:{DIGESTS['md5']}:, sha-256=:{DIGESTS['sha-256']}:", "accepted"),
        (f"sha-256=:{DIGESTS['sha-256']}:, sha-512=:{DIGESTS['sha-512']}:", "accepted"),
        (f"sha-256=:{DIGESTS['sha-256']}:, sha-512=:{DIGESTS['sha-256']}:", "bad_signature"),
        (f"sha-256=:{DIGESTS['sha-512']}:", "bad_signature"),
        (f"md5=:{DIGESTS['md5']}:", "malformed_signature"),
        (f"sha-256={DIGESTS['sha-256']}", "malformed_signature"),
        (f'sha-256="{DIGESTS["sha-256"]}"', "bad_signature"),
        ("sha-256=()", "bad_signature"),
        ("", "malformed_signature"),
        (f"sha-256=:{DIGESTS['sha-256']}:;x={'y' * MAX_FIELD_BYTES}", "malformed_signature"),
    ],
)
def test_the_digest_is_that_of_the_body(digest: str, expected: str) -> None:
    """RFC 9530; and an unknown algorithm is no digest."""
    assert reason(checking("hmac-sha256"), signed(*DEFAULT, Content_Digest=digest)) == expected


def test_a_body_may_be_empty_but_not_added_nor_removed() -> None:
    verifier = checking("hmac-sha256")
    bare = signed("@method", "@target-uri", body=b"")
    assert reason(verifier, bare) == "accepted"
    assert reason(verifier, bare._replace(body=BODY)) == "bad_signature"
    assert reason(verifier, signed(*DEFAULT)._replace(body=b"")) == "bad_signature"
    assert reason(verifier, signed(*DEFAULT, body=b"")) == "accepted"


def test_what_the_rules_list_must_be_covered() -> None:
    verifier = checking("hmac-sha256", covered=["x-event-id", "@method"])
    assert reason(verifier, signed("@method", "x-event-id", "content-digest", X_Event_Id="1")) == "accepted"
    error = refusal(verifier, signed("@method", "content-digest", X_Event_Id="1"))
    assert error.detail == "expected a signature that covers x-event-id, got something else"
    assert reason(verifier, signed("@method", "x-event-id", X_Event_Id="1")) == "bad_signature"  # a body, not covered


def test_other_tags_do_not_count() -> None:
    verifier = checking("hmac-sha256", tag="acme")
    assert reason(verifier, signed(*DEFAULT, parameters=f';created={int(NOW)};tag="acme"')) == "accepted"
    assert reason(verifier, signed(*DEFAULT, parameters=f';created={int(NOW)};tag="acne"')) == "missing_signature"
    assert reason(verifier, signed(*DEFAULT)) == "missing_signature"


def test_of_several_signatures_any_is_enough_and_few_are_looked_at() -> None:
    verifier, good = checking("hmac-sha256"), dict(signed(*DEFAULT).headers)
    inputs, signature = good.pop(b"signature-input"), good.pop(b"signature")

    def beside(count: int, *, before: bool = True) -> Request:
        bad_inputs = b", ".join([b'b%d=("@method" "@target-uri");created=%d' % (n, int(NOW)) for n in range(count)])
        bad = b", ".join([b"b%d=:AAAA:" % n for n in range(count)])
        order = -1 if before else 1
        pairs = {b"signature-input": [bad_inputs, inputs][::order], b"signature": [bad, signature]}
        lines = [(name, value) for name, values in pairs.items() for value in values]
        return a_request([*good.items(), *lines], body=BODY, path="/foo")

    for before in (True, False):
        assert reason(verifier, beside(MAX_SIGNATURES - 1, before=before)) == "accepted"
        assert reason(verifier, beside(MAX_SIGNATURES, before=before)) == "malformed_signature"


def together(*requests: Request, body: bytes = BODY) -> Request:
    """Return a request with the signatures of several, in their order, and the other headers of the first."""
    first = dict(requests[0].headers)
    for name in (b"signature-input", b"signature"):
        values = [dict(each.headers)[name].replace(b"sig1=", b"s%d=" % n) for n, each in enumerate(requests)]
        first[name] = b", ".join(values)
    return requests[0]._replace(headers=tuple(first.items()), body=body, names=None)


@pytest.mark.parametrize("keyids", [(None, None), ("k1", "k1"), ("k1", "k2")])
def test_of_several_good_signatures_one_that_covers_the_body_is_enough_in_any_place(
    keyids: tuple[str | None, str | None],
) -> None:
    """Section 4.3: one signer may sign a message several times, other components each time."""
    named = [f";created={int(NOW)}" + (f';keyid="{each}"' if each else "") for each in keyids]
    of_address = signed("@method", "@target-uri", parameters=named[0])
    of_all = signed(*DEFAULT, parameters=named[1])
    secrets = [{"secret": SHARED, "keyid": each} if each else SHARED for each in dict.fromkeys(keyids)]
    verifier = checking("hmac-sha256", secrets=secrets)
    for order in ((of_address, of_all), (of_all, of_address), (of_address, of_address, of_all)):
        request = together(*order)
        assert reason(verifier, request) == "accepted"
        assert reason(verifier, request._replace(body=flip(BODY, 3))) == "bad_signature"
    assert reason(verifier, together(of_address, of_address)) == "bad_signature"


def test_a_forged_signature_over_the_body_lends_nothing_to_a_good_one_that_leaves_it_out() -> None:
    """What covers the body has to be good itself: else whoever has seen a request could send it with another body."""
    verifier = checking("hmac-sha256")
    good, forged = signed("@method", "@target-uri"), signed(*DEFAULT, body=b"{}")
    headers = dict(forged.headers)
    headers[b"signature"] = b"sig1=:" + base64.b64encode(bytes(32)) + b":"
    forged = forged._replace(headers=tuple(headers.items()))
    assert reason(verifier, together(good, body=b"")) == "accepted"
    for order in ((forged, good), (good, forged)):
        request = together(*order, body=b"{}")
        digest = dict(forged.headers)[b"content-digest"]
        request = request._replace(
            headers=tuple([(name, digest if name == b"content-digest" else value) for name, value in request.headers])
        )
        assert reason(verifier, request) == "bad_signature"


def test_the_secret_is_that_of_the_signature_that_covers_the_body() -> None:
    other = base64.b64encode(b"another secret of the sender").decode()
    secrets = [{"secret": SHARED, "keyid": "k1"}, {"secret": other, "keyid": "x"}, {"secret": SHARED, "keyid": "k2"}]
    by_first = signed("@method", "@target-uri", parameters=f';created={int(NOW)};keyid="k1"')
    by_last = signed(*DEFAULT, parameters=f';created={int(NOW)};keyid="k2"')
    verified = checking("hmac-sha256", secrets=secrets).verify(together(by_first, by_last), now=NOW)
    assert verified.secret == 2


@pytest.mark.parametrize(
    ("inputs", "signature", "expected"),
    [
        (None, "sig1=:AAAA:", "missing_signature"),
        ('sig1=("@method");created=1', None, "missing_signature"),
        ("", "", "missing_signature"),
        ("sig1", "sig1=:AAAA:", "malformed_signature"),
        ("sig1=1", "sig1=:AAAA:", "malformed_signature"),
        ("sig1=(", "sig1=:AAAA:", "malformed_signature"),
        ('sig1=("@method")', "sig2=:AAAA:", "malformed_signature"),
        ('sig1=("@method")', 'sig1="AAAA"', "malformed_signature"),
        ('sig1=("@method")', "sig1=AAAA", "malformed_signature"),
        ('sig1=("@method")', "sig1=(:AAAA:)", "malformed_signature"),
        ("sig1=(@method)", "sig1=:AAAA:", "malformed_signature"),
        ("sig1=(method);created=1700000000", "sig1=:AAAA:", "malformed_signature"),
        (f'sig1=("a{"x" * MAX_FIELD_BYTES}")', "sig1=:AAAA:", "malformed_signature"),
        ('sig1=("é")', "sig1=:AAAA:", "malformed_signature"),
        (
            "sig1=(" + " ".join([f'"x{n}"' for n in range(65)]) + ");created=1700000000",
            "sig1=:AAAA:",
            "malformed_signature",
        ),
    ],
)
def test_what_is_no_signature_is_refused(inputs: str | None, signature: str | None, expected: str) -> None:
    given = {"Signature-Input": inputs, "Signature": signature}
    request = a_request([(name, value) for name, value in given.items() if value is not None], body=BODY)
    assert reason(checking("hmac-sha256"), request) == expected


def test_a_signature_of_another_host_is_refused_whatever_host_the_request_names() -> None:
    """Else who has seen a request to one of a sender's receivers could send it to each of the others."""
    elsewhere = checking("hmac-sha256", public_url="https://other.example/foo")
    for components in (DEFAULT, ("@method", "@authority", "@path", "content-digest")):
        assert reason(elsewhere, signed(*components, Host="example.com")) == "bad_signature"


def test_the_head_alone_refuses_what_no_body_could_make_good() -> None:
    verifier = checking("hmac-sha256")
    good = signed(*DEFAULT)
    verifier.check_head(good._replace(body=b""), now=NOW).verify(good)
    for bad in (signed("content-digest"), good._replace(query="a=1"), good._replace(method="PUT")):
        with pytest.raises(Exception, match="signature"):
            verifier.check_head(bad._replace(body=b""), now=NOW)


def refusing(request: Request) -> float:
    """Return the seconds of processor time that it takes to refuse a request."""
    verifier = checking("hmac-sha256")
    began = time.thread_time()
    assert reason(verifier, request) == "bad_signature"
    return time.thread_time() - began


def test_the_worst_request_costs_little() -> None:
    """Each of four signatures over 64 components, each of which is a parameter of a large query, or of a field."""
    query = "&".join([f"q{n}=" + "v" * 40 for n in range(MAX_PARAMETERS - 1)])
    field = ", ".join([f"k{n}=" + "1" * 12 for n in range(400)])
    for components in (
        " ".join([f'"@query-param";name="q{n}"' for n in range(60)]),
        " ".join([f'"x";key="k{n}"' for n in range(60)]),
    ):
        inputs = ", ".join([f's{n}=("@method" "@target-uri" {components});created={int(NOW)}' for n in range(4)])
        signature = ", ".join([f"s{n}=:AAAA:" for n in range(4)])
        pairs = [("Signature-Input", inputs), ("Signature", signature), ("X", field)]
        assert as_usual(partial(refusing, a_request(pairs, query=query))) < 0.1


def test_as_many_parameters_of_a_query_are_looked_at_as_of_any_other_request() -> None:
    """Thousands of them took a forger's request milliseconds, before anything was verified."""
    verifier = checking("hmac-sha256", secrets=[SHARED], covered=['@query-param;name="a"'])
    for more, expected in ((MAX_PARAMETERS - 1, "accepted"), (MAX_PARAMETERS, "malformed_signature")):
        query = "a=1" + "&b=2" * more
        assert reason(verifier, signed("content-digest", '"@query-param";name="a": 1', query=query)) == expected


# ---- Keys ----


def test_a_key_with_an_id_verifies_its_signatures_alone() -> None:
    verifier = checking("hmac-sha256", secrets=[{"secret": SHARED, "keyid": "k1"}])
    for name, expected in (("k1", "accepted"), ("k2", "bad_signature")):
        parameters = f';created={int(NOW)};keyid="{name}"'
        assert reason(verifier, signed(*DEFAULT, parameters=parameters)) == expected
    assert reason(verifier, signed(*DEFAULT)) == "bad_signature"


def test_the_place_of_the_secret_is_told_and_its_end_counts() -> None:
    other = base64.b64encode(b"another secret of the sender").decode()
    verifier = checking(
        "hmac-sha256", secrets=[other, {"secret": SHARED, "until": "2023-11-15"}, {"secret": other, "keyid": "x"}]
    )
    assert verifier.verify(signed(*DEFAULT), now=NOW).secret == 1
    later = NOW + 2 * 86400
    parameters = f";created={int(later)}"
    assert reason(verifier, signed(*DEFAULT, parameters=parameters), now=later) == "bad_signature"


ED_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EC_KEY = ec.derive_private_key(7, ec.SECP256R1())
SET = "https://keys.example.com/certs"


def a_key_set(*, one: ed25519.Ed25519PublicKey, **curves: ec.EllipticCurvePublicKey) -> bytes:
    entries = [{**orjson.loads(jwt.algorithms.OKPAlgorithm.to_jwk(one)), "kid": "one"}]
    for name, key in curves.items():
        entries.append({**orjson.loads(jwt.algorithms.ECAlgorithm.to_jwk(key)), "kid": name})
    return orjson.dumps({"keys": entries})


def by_ed25519(name: str | None = "one") -> Request:
    """Return the request of DEFAULT signed with a key that isn't in the rules."""
    keyid = "" if name is None else f';keyid="{name}"'
    request = signed(*DEFAULT, parameters=f";created={int(NOW)}{keyid}")
    headers = dict(request.headers)
    described = headers[b"signature-input"].decode().removeprefix("sig1=")
    digest = headers[b"content-digest"].decode()
    base = f'"@method": POST\n"@target-uri": {URL}\n"content-digest": {digest}\n"@signature-params": {described}'
    headers[b"signature"] = b"sig1=:" + base64.b64encode(ED_KEY.sign(base.encode())) + b":"
    return request._replace(headers=tuple(headers.items()))


def test_a_key_of_a_set_is_fetched_and_verifies() -> None:
    keys = KeyCache()
    verifier = checking("ed25519", public_keys=None, key_set=SET)
    assert verifier.fetches_keys
    assert reason(verifier, by_ed25519(), keys=keys) == SET
    keys.keep(SET, a_key_set(one=ED_KEY.public_key(), curve=EC_KEY.public_key()), NOW)
    assert reason(verifier, by_ed25519(), keys=keys) == "accepted"
    assert reason(verifier, by_ed25519()._replace(body=b"{}"), keys=keys) == "bad_signature"
    assert reason(verifier, by_ed25519("curve"), keys=keys) == "bad_key"  # of another kind
    assert reason(verifier, by_ed25519(None), keys=keys) == "bad_key"
    assert reason(verifier, by_ed25519("two"), now=NOW, keys=keys) == "bad_key"
    assert reason(verifier, by_ed25519("two"), now=NOW + PAUSE, keys=keys) == SET


def test_keys_of_several_types_may_have_one_id_in_a_set() -> None:
    """RFC 7517, section 4.5. The one that verifies is of the rule's algorithm, whichever comes first in the set."""
    entries = orjson.loads(a_key_set(one=ED_KEY.public_key(), curve=EC_KEY.public_key()))["keys"]
    for order in (entries, entries[::-1]):
        keys = KeyCache()
        keys.keep(SET, orjson.dumps({"keys": [{**each, "kid": "one"} for each in order]}), NOW)
        assert reason(checking("ed25519", public_keys=None, key_set=SET), by_ed25519(), keys=keys) == "accepted"
        for algorithm, expected in (("ecdsa-p256-sha256", "bad_signature"), ("rsa-pss-sha512", "bad_key")):
            other = checking(algorithm, public_keys=None, key_set=SET)
            assert reason(other, by_ed25519(), keys=keys) == expected


def test_an_unknown_key_beside_a_known_one_fetches_nothing() -> None:
    keys = KeyCache()
    keys.keep(SET, a_key_set(one=ED_KEY.public_key()), NOW - PAUSE)
    request = by_ed25519()
    headers = [
        (name, value + b', x=("@method" "@target-uri");created=%d;keyid="made-up"' % int(NOW))
        if name == b"signature-input"
        else (name, value + b", x=:AAAA:" if name == b"signature" else value)
        for name, value in request.headers
    ]
    verifier = checking("ed25519", public_keys=None, key_set=SET)
    assert reason(verifier, request._replace(headers=tuple(headers)), keys=keys) == "accepted"


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_a_key_of_another_algorithm_is_refused(algorithm: str) -> None:
    keys = {"ed25519": ED25519, "ecdsa-p256-sha256": P256, "rsa": RSA_PSS}
    for kind, key in keys.items():
        if algorithm != "hmac-sha256" and not algorithm.startswith(kind):
            with pytest.raises(SchemeError, match=r"public_keys\.0: expected an? .* public key"):
                checking(algorithm, public_keys=[key])


@pytest.mark.parametrize("algorithm", ["rsa-pss-sha512", "rsa-v1_5-sha256"])
def test_the_two_signatures_of_rsa_are_not_each_other(algorithm: str) -> None:
    assert isinstance(load_pem_public_key(RSA_PSS.encode()), rsa.RSAPublicKey)
    expected = "accepted" if algorithm == "rsa-pss-sha512" else "bad_signature"
    assert reason(checking(algorithm, public_keys=[RSA_PSS]), the_request(*FULL), now=CREATED) == expected


def test_ecdsa_is_two_integers_of_32_bytes() -> None:
    pem = EC_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    request = by_ed25519()
    described = dict(request.headers)[b"signature-input"].decode().removeprefix("sig1=")
    digest = dict(request.headers)[b"content-digest"].decode()
    base = f'"@method": POST\n"@target-uri": {URL}\n"content-digest": {digest}\n"@signature-params": {described}'
    der = EC_KEY.sign(base.encode(), ec.ECDSA(SHA256()))
    first, second = decode_dss_signature(der)
    raw = first.to_bytes(32, "big") + second.to_bytes(32, "big")
    verifier = checking("ecdsa-p256-sha256", public_keys=[pem])
    for signature, expected in ((raw, "accepted"), (der, "bad_signature"), (b"\0" + raw, "bad_signature")):
        written = b"sig1=:" + base64.b64encode(signature) + b":"
        pairs = [(name, written if name == b"signature" else value) for name, value in request.headers]
        assert reason(verifier, request._replace(headers=tuple(pairs))) == expected


# ---- Test events, and the rules ----


@pytest.mark.parametrize("covered", [None, ["@method", "x-event-id", "content-digest"], ["@authority", "@query"]])
def test_a_test_event_is_signed_and_accepted(covered: list[str] | None) -> None:
    more = {} if covered is None else {"covered": covered}
    verifier = checking("hmac-sha256", secrets=[{"secret": SHARED, "keyid": "k1"}], tag="acme", **more)
    pairs = verifier.sign(BODY, now=NOW, id="1", type="t", headers={"X-Event-Id": "1"}, path="/foo", query="a=1")
    names = [name for name, _ in pairs]
    assert names == ["X-Event-Id", "Content-Digest", "Signature-Input", "Signature"]
    assert 'keyid="k1";tag="acme"' in dict(pairs)["Signature-Input"]
    assert reason(verifier, a_request(pairs, body=BODY, query="a=1", path="/foo")) == "accepted"


def test_a_test_event_that_lacks_a_covered_header_is_refused() -> None:
    verifier = checking("hmac-sha256", covered=["x-event-id"])
    with pytest.raises(UsageError, match="expected the header x-event-id, which is signed, got none"):
        verifier.sign(BODY, now=NOW, id="1", type="t", headers={})
    with pytest.raises(UsageError, match="only the sender has the private key"):
        checking().sign(BODY, now=NOW, id="1", type="t", headers={})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"public_url": None},
            "expected the source's public_url beside `verify`, since the address that the sender knows is signed",
        ),
        ({"algorithm": "rsa-sha256"}, "algorithm: expected one of hmac-sha256, ed25519, ecdsa-p256-sha256"),
        ({"algorithm": "hmac-sha256", "secrets": None}, "expected the key 'secrets' with hmac-sha256, got none"),
        ({"algorithm": "hmac-sha256", "key_set": SET}, "key_set: expected no 'key_set' with hmac-sha256, got some"),
        ({"algorithm": "hmac-sha256", "secrets": [""]}, "secrets.0: expected a non-empty string, got a blank"),
        ({"algorithm": "hmac-sha256", "secrets": ["="]}, "secrets.0: expected base64, got something else"),
        (
            {"algorithm": "ed25519", "public_keys": [ED25519], "key_set": SET},
            "expected the key 'public_keys' or 'key_set' with ed25519, got public_keys and key_set",
        ),
        (
            {"algorithm": "ed25519", "public_keys": [ED25519], "secrets": ["s"]},
            "secrets: expected no 'secrets' with ed25519, got some",
        ),
        (
            {"algorithm": "ed25519", "public_keys": [ED25519], "secret_encoding": "hex"},
            "secret_encoding: expected no 'secret_encoding' with ed25519, got some",
        ),
        ({"covered": []}, "covered: expected a list of 1 to 64 components such as @method or content-type, got"),
        ({"covered": ["@status"]}, "covered.0: expected a component of a request, such as @target-uri, date or"),
        ({"covered": ["Date"]}, "covered.0: expected a component of a request"),
        ({"covered": ['x";y']}, "covered.0: expected a component of a request"),
        ({"tag": "é"}, "tag: expected at most 256 printable ASCII characters, got"),
        ({"secrets": [{"secret": "s" * 20, "keyid": "é"}]}, "secrets.0.keyid: expected at most 256 printable ASCII"),
        (
            {"secrets": [{"secret": "s" * 20, "id": "x"}]},
            "secrets.0: expected the keys secret and until and keyid alone",
        ),
    ],
)
def test_the_rules_say_what_is_wrong(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(SchemeError) as caught:
        checking(**{"algorithm": "hmac-sha256", **config})
    assert expected in str(caught.value)


def test_a_misplaced_secret_is_not_shown() -> None:
    with pytest.raises(SchemeError) as caught:
        checking("hmac-sha256", secrets=[{"secret": "x" * 20, "keyid": "hush-hush\n"}])
    assert "hush" not in str(caught.value)


def test_its_headers_are_about_the_whole_body() -> None:
    """So that an event of several in a request has neither (event_builder.py)."""
    [spec] = checking("hmac-sha256").signing_specs
    assert (spec.header, spec.timestamp_header, spec.tolerance) == ("Signature", "Signature-Input", 300)
    [spec] = checking("hmac-sha256", tolerance="none").signing_specs
    assert spec.tolerance is None


def test_what_is_kept_of_a_refused_request_can_be_verified_again() -> None:
    """By the secret that it was signed with, once that is known: nothing that must be signed is left out of it."""
    given: Mapping[str, Any] = {"secret_encoding": "base64", "covered": ["date", "@method"]}
    old, new = [
        checking("hmac-sha256", secrets=[secret], **given) for secret in (base64.b64encode(bytes(32)).decode(), SHARED)
    ]
    sent = signed("date", "@method", "content-digest", Date="Tue, 20 Apr 2021 02:07:55 GMT", Cookie="session=1")
    assert reason(old, sent) == "bad_signature"
    kept = conceal(old, sent, bytes(16))
    assert b"cookie" not in dict(kept.headers)
    assert reason(new, sent._replace(headers=kept.headers, names=None)) == "accepted"


PIECES = st.sampled_from(
    [
        *('sig1=("@method" "@target-uri" "content-digest")', "sig1", "=", "(", ")", '"@path"', '"@query"', '"x-a"'),
        *(
            '"@query-param";name="a"',
            ";bs",
            ';key="b"',
            ";sf",
            ";created=1700000000",
            ";expires=1",
            ';keyid="k"',
            ";alg",
        ),
        *("sig1=:AAAA:", ":", "sha-256=", ",", " ", "-1.5", "?1", "@7", "tok", '"', "\\", "\xff", "\x00", "é"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    inputs=st.lists(PIECES, max_size=12).map("".join),
    signature=st.lists(PIECES, max_size=6).map("".join),
    digest=st.lists(PIECES, max_size=6).map("".join),
    field=st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=9)),
    query=st.text(max_size=9),
    algorithm=st.sampled_from(["hmac-sha256", "ed25519", "ecdsa-p256-sha256", "rsa-pss-sha512"]),
)
def test_no_head_does_more_than_be_refused(
    *, inputs: str, signature: str, digest: str, field: str, query: str, algorithm: str
) -> None:
    texts = {"Signature-Input": inputs, "Signature": signature, "Content-Digest": digest, "X-A": field}
    pairs = [(name, text.encode("utf-8", "surrogatepass")) for name, text in texts.items()]
    query = query.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    for tolerance in ("5m", "none"):
        verifier = checking(algorithm, tolerance=tolerance, covered=["@method"])
        assert reason(verifier, a_request(pairs, body=BODY, query=query)) != "accepted"
