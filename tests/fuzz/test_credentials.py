"""What vouches for a request, and the keys for it, given what nearly fits: accepted or refused, and nothing else."""

import base64
import json
import time
from collections.abc import Sequence
from typing import Any, assert_never
from urllib.parse import quote_from_bytes

import jwt
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import strategies as st

from gateway.ingress.certificate_headers import certificate_in
from gateway.model import RefusedError
from gateway.rules.rules import CertificateFormat
from gateway.telemetry.metrics import REJECTIONS
from gateway.verify.client_certificates import ClientCertificates, read_authorities
from gateway.verify.json_web_tokens import ALGORITHMS, SYMMETRIC
from gateway.verify.remote_keys import MAX_URL, KeyCache, KeyNeededError, read_document
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.certificates import Authority
from tests.fuzz.inputs import ENOUGH_TIME, damaged, fuzz, made_of, took
from tests.verify.signed_requests import NOW, a_request, a_verifier
from tests.verify.vectors import Vector, vectors

pytestmark = ENOUGH_TIME
MOST_SECONDS = 0.5  # of processor time, for inputs of some kilobytes
MOST_MEMORY = 4 << 20  # bytes for one of them


def outcome(verifier: Verifier, request: Request, *, now: float, keys: KeyCache | None = None) -> str:
    """Return what becomes of a request: "accepted", the reason of a refusal, or the address of a key."""
    began = time.thread_time()
    try:
        verifier.verify(request, now=now, keys=keys)
        found = "accepted"
    except RefusedError as error:
        assert error.status in {400, 401, 403, 413, 503}
        assert error.reason in REJECTIONS
        assert len(error.detail) < 300  # it is logged, and sent
        found = error.reason
    except KeyNeededError as error:
        assert error.url.startswith("https://")
        assert len(error.url) <= MAX_URL
        found = error.url
    assert took(began) < MOST_SECONDS
    return found


# --- Signatures ---

VECTORS = list(vectors())
VERIFIERS = {id(vector): vector.verifier() for vector in VECTORS}
HEADER_PIECES = [
    *rb', ; = : " \ () t= v1= v1, sha256= sig1= @ ?1 keyid= alg= created= expires= tag= ;bs ;sf ;key= null'.split(),
    *b"-1 1e308 NaN 2023-11-14T22:13:20Z 0000-00-00T99:99:99+99:99 %00 { } [ ]".split(),
    *[
        b" ",
        b"\t",
        b"Bearer ",
        b"Basic ",
        b"Digest ",
        b"9" * 400,
        b"=" * 5,
        b"A" * 600,
        b"a," * 600,
        b"\xff",
        b"\xc3\xa9",
    ],
]
QUERY_PIECES = [b"&", b"%", b"%zz", *HEADER_PIECES]
BODY_PIECES = [b'"Signature":', b"1e400", b"[" * 1200, *HEADER_PIECES]


@st.composite
def nearly_signed(draw: st.DrawFn) -> tuple[Vector, Request]:
    """Draw a request that was signed, of which headers, lines, the query or the body are damaged."""
    vector = draw(st.sampled_from(VECTORS))
    headers = list(vector.request.headers)
    query, body = vector.request.query.encode(), vector.request.body
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["value", "value", "value", "line", "none", "query", "body"]))
        if what == "query":
            query = draw(damaged(st.just(query), QUERY_PIECES))
        elif what == "body":
            body = draw(damaged(st.just(body), BODY_PIECES))
        elif headers:
            at = draw(st.integers(0, len(headers) - 1))
            name, value = headers[at]
            if what == "value":
                headers[at] = (name, draw(damaged(st.just(value), HEADER_PIECES)).strip(b" \t"))
            elif what == "line":
                headers.insert(at, (name, draw(st.sampled_from([value, b"", *HEADER_PIECES]))))
            else:
                del headers[at]
    text = query.decode("utf-8", "surrogateescape")
    return vector, vector.request._replace(headers=tuple(headers), query=text, body=body)


def test_a_signature_that_nearly_fits_is_refused_or_accepted() -> None:
    def check(drawn: tuple[Vector, Request]) -> None:
        vector, request = drawn
        outcome(VERIFIERS[id(vector)], request, now=vector.now, keys=vector.keys)

    fuzz("signatures", nearly_signed(), check, examples=500, most_memory=MOST_MEMORY)


# --- Tokens ---

SECRET = "hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush"
EC_KEY = ec.generate_private_key(ec.SECP256R1())
KEY_SET = "https://keys.example.com/set.json"
JSON_PIECES = [
    *rb'{ } [ ] , : " null true 1e400 -1 NaN "exp": "iat": "nbf": "aud": "kid": "alg": "none" "crit":["b64"]'.split(),
    *rb'"b64":false "typ": "jwk":{ "jku":"https://x" \ud800'.split(),
    *[b"1" * 400, b"\xff", b"[" * 1200],
]
HEADERS = [
    b'{"alg":"HS256","typ":"JWT","kid":"k"}',
    b'{"alg":"ES256","kid":"k"}',
    b'{"alg":"none"}',
    b'{"alg":"RS256"}',
    b"{}",
]
CLAIMS = [
    b'{"exp":1700000060,"iat":1700000000,"nbf":1699999999,"aud":["a","b"],"iss":"i"}',
    b'{"iat":1.7e9,"aud":"a"}',
    b"{}",
    b"[]",
    b"7",
]


def token_verifiers() -> Sequence[Verifier]:
    pem = EC_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    url = "https://hooks.example.com/in/it"
    return [
        a_verifier("jwt", algorithms=list(SYMMETRIC), secrets=[SECRET], claims={"iss": "i"}, public_url=url),
        a_verifier("jwt", algorithms="HS256", secrets=[SECRET], tolerance="5m", public_url=url),
        a_verifier("jwt", algorithms="ES256", secrets=None, public_keys=[pem], public_url=url),
        a_verifier("jwt", algorithms="ES256", secrets=None, key_set=KEY_SET, public_url=url),
    ]


@st.composite
def tokens(draw: st.DrawFn) -> bytes:
    """Draw a token whose parts are damaged before it is signed, and which is damaged once more after that, or not."""
    parts = [
        base64.urlsafe_b64encode(draw(damaged(st.sampled_from(seeds), JSON_PIECES))).rstrip(b"=")
        for seeds in (HEADERS, CLAIMS)
    ]
    signed = b".".join(parts)
    algorithm = draw(st.sampled_from(["HS256", "HS384", "HS512", "ES256"]))
    signer = jwt.PyJWS(algorithms=list(ALGORITHMS))._algorithms[algorithm]
    signature = signer.sign(signed, EC_KEY if algorithm == "ES256" else signer.prepare_key(SECRET))
    token = b".".join([signed, base64.urlsafe_b64encode(signature).rstrip(b"=")])
    return draw(st.just(token) | damaged(st.just(token), [b".", b"=", b"Bearer ", b" ", b"\xff", b"A" * 50]))


def test_a_token_that_nearly_fits_is_refused_or_accepted() -> None:
    verifiers = token_verifiers()
    keys = KeyCache()
    keys.keep(KEY_SET, json.dumps({"keys": [{**_jwk(EC_KEY.public_key()), "kid": "k"}]}).encode(), NOW)
    seen: set[str] = set()

    def check(token: bytes) -> None:
        for verifier in verifiers:
            seen.add(outcome(verifier, a_request([("Authorization", b"Bearer " + token)]), now=NOW, keys=keys))

    fuzz("tokens", tokens(), check, examples=300, most_memory=MOST_MEMORY)
    assert {"accepted", "bad_signature", "malformed_signature"} <= seen


# --- Keys that are fetched ---


def _jwk(key: Any) -> dict[str, Any]:
    made = jwt.algorithms.ECAlgorithm.to_jwk(key, as_dict=True)
    assert isinstance(made, dict)
    return made


def _pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


FETCHING = [vector for vector in VECTORS if vector.documents]
DOCUMENTS = [document.encode() for vector in FETCHING for document in vector.documents.values()]
PLAID = json.dumps({"key": {**_jwk(EC_KEY.public_key()), "kid": "k", "expired_at": 1700000000}}).encode()
OTHER_KEYS = [
    _pem(dsa.generate_private_key(1024)),
    _pem(ec.generate_private_key(ec.SECP521R1())),
    _pem(ed448.Ed448PrivateKey.generate()),
    _pem(ed25519.Ed25519PrivateKey.generate()),
    _pem(x25519.X25519PrivateKey.generate()),
    _pem(rsa.generate_private_key(65537, 1024)),
    Authority("it").pem.encode(),
]
BEGIN, END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
DOCUMENT_PIECES = [
    *[BEGIN, END, b"-----BEGIN PUBLIC KEY-----", b"\n", b"\xff", b"A" * 64, b"[" * 1200],
    *b'{ {"keys":[ "kty": "RSA" "n":" "e":"AQAB" "crv":"P-256" "kid":7 "k":"AAAA" "key":{ ]} null 1e400'.split(),
    b'"expired_at":"x"',
]
DER_PIECES = [
    b"\x30\x80", b"\x30\x84\xff\xff\xff\xff", b"\x02\x01\0", b"\x05\0", b"\0\0", b"\x06\x03\x55\x04\x03", b"\x17\x0d",
    b"\xa3\x03", b"\x0c\x01\xff", b"\x1e\x02\xd8\0",
]  # fmt: skip


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Draw a document with a key; of PEM also one whose DER is damaged, which its base64 hides."""
    if draw(st.booleans()):
        return draw(made_of([*DOCUMENTS, *OTHER_KEYS, PLAID], DOCUMENT_PIECES))
    pem = draw(st.sampled_from([each for each in (*DOCUMENTS, *OTHER_KEYS) if each.startswith(b"-----")]))
    inside, _, rest = pem.partition(b"-----END")
    begin, *lines = inside.splitlines()
    der = draw(damaged(st.just(base64.b64decode(b"".join(lines))), DER_PIECES))
    return b"\n".join([begin, base64.b64encode(der), b"-----END" + rest])


def test_a_document_that_is_fetched_has_a_key_or_none() -> None:
    """And a key of any kind that is in one verifies what it does, and fails no request otherwise."""
    kept = 0

    def check(document: bytes) -> None:
        nonlocal kept
        began = time.thread_time()
        try:
            read_document(document)
        except ValueError:
            return
        finally:
            assert took(began) < MOST_SECONDS
        kept += 1
        for vector in FETCHING:
            keys = KeyCache()
            for url in vector.documents:
                keys.keep(url, document, vector.now)
            outcome(VERIFIERS[id(vector)], vector.request, now=vector.now, keys=keys)

    fuzz("documents", documents(), check, most_memory=MOST_MEMORY)
    assert kept


# --- Certificates in headers ---

ROOT = Authority("bank")
MIDDLE = Authority("bank, departments", issuer=ROOT)
DEMANDED = ClientCertificates(authorities=read_authorities(ROOT.pem), dns=frozenset({"hooks.bank.example"}))
CERTIFICATES = [
    base64.b64decode("".join(pem.split("-----END")[0].splitlines()[1:]))
    for pem in (MIDDLE.issue("hooks.bank.example", "spiffe://bank/hooks")[0], MIDDLE.pem, ROOT.pem)
]
CERTIFICATE_PIECES = [*rb'Cert=" Chain=" ; , : = \" %2B % Hash=0'.split(), BEGIN, END, b"\n", b"\xff", b"A" * 40]


@st.composite
def certificate_headers(draw: st.DrawFn) -> tuple[CertificateFormat, list[bytes], list[bytes]]:
    """Draw a header with a certificate and its chain, damaged inside or outside."""
    ders = [
        draw(st.just(each) | damaged(st.just(each), DER_PIECES)) for each in CERTIFICATES[: draw(st.integers(1, 3))]
    ]
    texts = [base64.b64encode(each) for each in ders]
    pem = b"".join([b"%b\n%b\n%b\n" % (BEGIN, each, END) for each in texts])
    format_: CertificateFormat = draw(st.sampled_from(list(CertificateFormat)))
    chain: list[bytes] = []
    match format_:
        case CertificateFormat.XFCC:
            value = b'Hash=0;Cert="%b";Subject="CN=\\"x"' % quote_from_bytes(pem, safe="").encode()
        case CertificateFormat.PEM:
            value = quote_from_bytes(pem).encode()
        case CertificateFormat.RFC9440:
            value, chain = b":%b:" % texts[0], [b", ".join([b":%b:" % each for each in texts[1:]])] if texts[1:] else []
        case _:
            assert_never(format_)
    return format_, [draw(st.just(value) | damaged(st.just(value), CERTIFICATE_PIECES))], chain


def test_a_certificate_in_a_header_is_one_or_refused() -> None:
    seen: set[str | None] = set()

    def check(drawn: tuple[CertificateFormat, list[bytes], list[bytes]]) -> None:
        began = time.thread_time()
        try:
            found = certificate_in(*drawn)
            seen.add(None if found is None else DEMANDED.check(found, now=time.time()))
        except RefusedError as error:
            assert error.status == 403
            seen.add(error.reason)
        assert took(began) < MOST_SECONDS

    fuzz("certificates", certificate_headers(), check, most_memory=MOST_MEMORY)
    assert {None, "client_certificate_malformed", "client_certificate_refused"} <= seen
