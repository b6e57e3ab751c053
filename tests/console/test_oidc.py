"""People sign in by a provider of OpenID Connect, which may be hostile, away, or changing its keys."""

import base64
import hashlib
import hmac
import json
import time
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm
from structlog.testing import capture_logs

from gateway.access.access import Refusal
from gateway.access.access_file import Grant, with_token
from gateway.access.oidc import IdTokenError, identity_of
from gateway.access.principal import AccessRole
from gateway.access.sessions import FLOW_AGE, SKEW
from gateway.access.sign_in_lines import Oidc
from gateway.access.throttle import BURST
from gateway.access.tokens import digest_of, token_of
from gateway.client.egress import EgressGuard
from gateway.ops.audit import Act, read_acts
from gateway.rules.rules import Egress
from gateway.verify.remote_keys import FRESH, PAUSE, USABLE
from tests.certificates import Authority
from tests.console.signing import (
    CALLBACK,
    HOST,
    ORIGIN,
    PAGE,
    Browser,
    Desk,
    FakeProvider,
    Reply,
    desk_of,
    half_hash,
    provider_of,
)

PEOPLE = "person ada@example.com operator\nperson *@example.com viewer\n"
TOKEN = token_of(b"\x01" * 32)
SESSION, FLOW = "__Host-signed-in", "__Host-signing-in"
Claims = dict[str, Any]


def file_text(provider: FakeProvider, options: str = "", people: str = PEOPLE) -> str:
    return f"sign-in {ORIGIN}\noidc {provider.issuer} client=gateway secret=${{OIDC_SECRET}} {options}\n{people}"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def provider(key: rsa.RSAPrivateKey) -> FakeProvider:
    return FakeProvider(key=key)


@pytest.fixture
async def desk(tmp_path: Path, authority: Authority, provider: FakeProvider) -> AsyncIterator[Desk]:
    async with (
        provider_of(tmp_path, authority, provider) as client,
        desk_of(tmp_path, file_text(provider), client=client) as made,
    ):
        yield made


@pytest.fixture
def browser(desk: Desk) -> Browser:
    return desk.browser(**HOST)


async def begin(browser: Browser, page: str = PAGE) -> str:
    """Follow the link of a page, and return where the provider is asked."""
    reply = await browser.get(page)
    assert reply.status == 401
    (link,) = [each for each in reply.document.links if each.startswith("/ui/sign-in/provider")]
    reply = await browser.get(link)
    assert reply.status == 303, reply.text
    return reply.location


async def through(browser: Browser, provider: FakeProvider, page: str = PAGE) -> Reply:
    """Sign in by the provider, as far as what comes back from there."""
    return await browser.get(provider.authorize(await begin(browser, page)))


async def test_a_person_whom_the_provider_names_is_who_the_file_says(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    with capture_logs() as lines:
        location = await begin(browser, "/ui/events?query=a%20b")
        asked = dict(parse_qsl(urlsplit(location).query))
        assert location.startswith(f"{provider.issuer}/authorize?")
        assert (asked["response_type"], asked["client_id"], asked["scope"]) == ("code", "gateway", "openid email")
        assert asked["redirect_uri"] == f"{ORIGIN}{CALLBACK}"
        assert asked["code_challenge_method"] == "S256"
        assert len({asked["state"], asked["nonce"], asked["code_challenge"]}) == 3
        reply = await browser.get(provider.authorize(location))
    assert (reply.status, reply.location) == (303, "/ui/events?query=a%20b")
    assert FLOW not in browser.cookies
    page = await browser.get(PAGE)
    assert page.status == 200
    assert "ada@example.com" in page.document.text
    assert "operator" in page.document.text
    assert desk.signed_in == {"oidc": 1}
    (line,) = [each for each in lines if each["event"] == "signed_in"]
    assert (line["who"], line["via"], line["role"]) == ("ada@example.com", "oidc", "operator")
    for secret in ("s3cret", "c0de", "acc3ss", asked["state"], asked["nonce"]):
        assert secret not in str(lines)
    (given,) = provider.given
    assert given["grant_type"] == "authorization_code"
    assert given["authorization"].startswith("Basic ")
    assert "client_secret" not in given


async def test_a_provider_that_takes_the_secret_in_the_body_gets_it_there(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    provider.discovery = lambda found: {**found, "token_endpoint_auth_methods_supported": ["client_secret_post"]}
    assert (await through(browser, provider)).status == 303
    (given,) = provider.given
    assert (given["client_id"], given["client_secret"], given["authorization"]) == ("gateway", "s3cret", "")
    assert desk.refused == {Refusal.NO_CREDENTIALS: 1}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (["sre"], "operator"),
        (["support"], "viewer"),
        (["support", "sre"], "viewer"),  # the first line that fits counts
        ("sre", "operator"),
        (["SRE"], None),
        ([], None),
        (None, None),
        ({"sre": True}, None),
        ([["sre"]], None),
    ],
)
async def test_groups_have_roles(
    desk: Desk, browser: Browser, provider: FakeProvider, groups: object, expected: str | None
) -> None:
    people = "person ada@example.org reader\ngroup support viewer owner=payments\ngroup sre operator\n"
    await desk.change(file_text(provider, "groups=teams scope=email scope=groups", people))
    provider.claims = lambda claims: {**claims, "teams": groups}
    reply = await through(browser, provider)
    if expected is None:
        assert reply.status == 403
        assert "expected a person who is given access, got ada@example.com" in reply.document.text
        assert desk.refused[Refusal.UNKNOWN_PERSON] == 1
        return
    assert reply.status == 303
    page = (await browser.get(PAGE)).document.text
    assert expected in page
    assert ("Limited to owners payments" in page) is (expected == "viewer")


async def test_a_person_with_a_line_of_their_own_has_that_whatever_their_groups(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    await desk.change(file_text(provider, "groups=groups", "group sre operator\nperson Ada@Example.com viewer\n"))
    provider.claims = lambda claims: {**claims, "groups": ["sre"]}
    assert (await through(browser, provider)).status == 303
    assert "viewer" in (await browser.get(PAGE)).document.text


async def test_a_line_of_their_own_ends_what_somebody_in_a_group_sees(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    """As docs/access.md has it for somebody whose account is closed: their session is good for hours."""
    await desk.change(file_text(provider, "groups=groups", "group sre operator\n"))
    provider.claims = lambda claims: {**claims, "groups": ["sre"]}
    assert (await through(browser, provider)).status == 303
    assert "operator" in (await browser.get(PAGE)).document.text
    await desk.change(
        file_text(provider, "groups=groups", "group sre operator\nperson ada@example.com viewer owner=nobody\n")
    )
    page = (await browser.get(PAGE)).document.text
    assert "Limited to owners nobody" in page
    assert "operator" not in page


async def test_groups_that_the_provider_leaves_out_are_told(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    await desk.change(file_text(provider, "groups=groups", "group sre operator\n"))
    provider.claims = lambda claims: {**claims, "_claim_names": {"groups": "src1"}}
    assert "left out their groups" in (await through(browser, provider)).document.text


async def test_another_claim_may_name_people(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    await desk.change(file_text(provider, "name=preferred_username", "person ada operator\n"))
    provider.claims = lambda claims: {**claims, "email_verified": False, "preferred_username": "ada"}
    assert (await through(browser, provider)).status == 303


def without(claims: Claims, *names: str) -> Claims:
    return {name: value for name, value in claims.items() if name not in names}


def unsigned(_: FakeProvider, claims: Claims) -> str:
    return jwt.encode(claims, "", algorithm="none", headers={"kid": "k1"})


def by_the_clients_secret(_: FakeProvider, claims: Claims) -> str:
    return jwt.encode(claims, "s3cret".ljust(32, "."), algorithm="HS256", headers={"kid": "k1"})


def by_the_public_key_as_a_secret(provider: FakeProvider, claims: Claims) -> str:
    pem = provider.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def packed(part: bytes) -> bytes:
        return base64.urlsafe_b64encode(part).rstrip(b"=")

    head = packed(json.dumps({"alg": "HS256", "kid": "k1"}).encode()) + b"." + packed(json.dumps(claims).encode())
    return (head + b"." + packed(hmac.new(pem, head, hashlib.sha256).digest())).decode()


def by_another_key(provider: FakeProvider, claims: Claims) -> str:
    other = rsa.generate_private_key(65537, 2048)
    return jwt.encode(claims, other, algorithm="RS256", headers={"kid": provider.key_id})


def by_a_key_that_it_brings(provider: FakeProvider, claims: Claims) -> str:
    other = rsa.generate_private_key(65537, 2048)
    brought = {**jwt.algorithms.RSAAlgorithm.to_jwk(other.public_key(), as_dict=True), "kid": provider.key_id}
    return jwt.encode(claims, other, algorithm="RS256", headers={"kid": provider.key_id, "jwk": brought})


HOSTILE_TOKENS: dict[str, tuple[Callable[[FakeProvider, Claims], str], str]] = {
    "alg none": (unsigned, "alg: expected RS256"),
    "hs256 with the secret": (by_the_clients_secret, "alg: expected RS256"),
    "hs256 with the public key": (by_the_public_key_as_a_secret, "alg: expected RS256"),
    "another key": (by_another_key, "signature: it isn't by a key of the identity provider"),
    "a key of its own": (by_a_key_that_it_brings, "signature: it isn't by a key of the identity provider"),
    "another algorithm": (
        lambda provider, claims: provider.signed(claims, algorithm="RS384"),
        "alg: expected RS256",
    ),
    "an unknown key": (
        lambda provider, claims: provider.signed(claims, key_id="k9"),
        "kid: the identity provider publishes no such key",
    ),
    "no key's name": (
        lambda provider, claims: jwt.encode(claims, provider.key, algorithm="RS256"),
        "kid: expected the name of a key, got none",
    ),
    "a changed claim": (
        lambda provider, claims: ".".join(
            [
                *provider.signed(claims).split(".")[:1],
                provider.signed({**claims, "email": "eve@example.com"}).split(".")[1],
                *provider.signed(claims).split(".")[2:],
            ]
        ),
        "signature: it isn't by a key of the identity provider",
    ),
    "no token": (lambda *_: "a.b.c", "kid: expected the name of a key, got none"),
    "a huge token": (
        lambda provider, claims: provider.signed({**claims, "more": "x" * 40_000}),
        "kid: expected the name of a key, got none",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_TOKENS)
async def test_a_token_that_proves_nothing_signs_nobody_in(
    desk: Desk, browser: Browser, provider: FakeProvider, what: str
) -> None:
    provider.sign, problem = HOSTILE_TOKENS[what]
    with capture_logs() as lines:
        reply = await through(browser, provider)
    assert reply.status == 403
    assert f"id token: {problem}" in reply.document.text
    assert SESSION not in browser.cookies
    assert desk.refused[Refusal.BAD_ID_TOKEN] == 1
    assert [each["reason"] for each in lines if each["event"] == "sign_in_refused"] == ["bad_id_token"]
    assert "eyJ" not in f"{reply.text}{lines}"


HOSTILE_CLAIMS: dict[str, tuple[Callable[[Claims], Claims], str]] = {
    "another audience": (lambda c: {**c, "aud": "other"}, "aud: expected gateway"),
    "no audience": (lambda c: without(c, "aud"), "aud: expected it, got none"),
    "two audiences": (lambda c: {**c, "aud": ["gateway", "other"]}, "azp: expected gateway, got none"),
    "another party": (lambda c: {**c, "azp": "other"}, "azp: expected gateway, got 'other'"),
    "another issuer": (lambda c: {**c, "iss": "https://evil.example"}, "iss: expected https://127.0.0.1:"),
    "a longer issuer": (lambda c: {**c, "iss": c["iss"] + "/"}, "iss: expected https://127.0.0.1:"),
    "no issuer": (lambda c: without(c, "iss"), "iss: expected it, got none"),
    "another nonce": (lambda c: {**c, "nonce": "other"}, "nonce: it isn't that of this sign-in"),
    "no nonce": (lambda c: without(c, "nonce"), "nonce: it isn't that of this sign-in"),
    "expired": (lambda c: {**c, "exp": time.time() - SKEW - 1}, "exp: expected a token that is good"),
    "no end": (lambda c: without(c, "exp"), "exp: expected it, got none"),
    "an end that is text": (lambda c: {**c, "exp": "soon"}, "exp: expected a time in Unix seconds"),
    "an end that is true": (lambda c: {**c, "exp": True}, "exp: expected a time in Unix seconds"),
    "issued tomorrow": (lambda c: {**c, "iat": time.time() + SKEW + 5}, "iat: expected a time until now"),
    "issued long ago": (lambda c: {**c, "iat": time.time() - 3600}, "iat: expected a new token"),
    "not good yet": (lambda c: {**c, "nbf": time.time() + SKEW + 5}, "nbf: expected a time until now"),
    "another access token": (lambda c: {**c, "at_hash": half_hash("x")}, "at_hash: it isn't that of the access token"),
    "a hash that is none": (lambda c: {**c, "at_hash": 7}, "at_hash: it isn't that of the access token"),
    "an unverified address": (lambda c: {**c, "email_verified": False}, "email_verified: it isn't true"),
    "an address of nobody": (lambda c: without(c, "email_verified"), "email_verified: it isn't true"),
    "no address": (lambda c: without(c, "email"), "email: expected a person's name"),
    "a name that isn't text": (lambda c: {**c, "email": ["ada@example.com"]}, "email: expected a person's name"),
    "a name with controls": (lambda c: {**c, "email": "ada@example.com\n"}, "email: expected a person's name"),
}


@pytest.mark.parametrize("what", HOSTILE_CLAIMS)
async def test_a_token_that_claims_something_else_signs_nobody_in(
    desk: Desk, browser: Browser, provider: FakeProvider, what: str
) -> None:
    provider.claims, problem = HOSTILE_CLAIMS[what]
    reply = await through(browser, provider)
    assert reply.status == 403
    assert f"id token: {problem}" in reply.document.text
    assert SESSION not in browser.cookies
    assert desk.refused[Refusal.BAD_ID_TOKEN] == 1


@pytest.mark.parametrize(
    "claims",
    [
        lambda c: {**c, "aud": ["gateway"]},
        lambda c: {**c, "aud": ["gateway", "other"], "azp": "gateway"},
        lambda c: without(c, "at_hash"),
        lambda c: {**c, "email_verified": "true"},
        lambda c: {**c, "exp": time.time() - SKEW + 5, "iat": time.time() - 300},
        lambda c: {**c, "iat": time.time() + SKEW - 5, "nbf": time.time() + SKEW - 5},
    ],
)
async def test_what_providers_say_otherwise_is_good(
    desk: Desk, browser: Browser, provider: FakeProvider, claims: Callable[[Claims], Claims]
) -> None:
    provider.claims = claims
    assert (await through(browser, provider)).status == 303
    assert desk.refused == {Refusal.NO_CREDENTIALS: 1}


ANSWERS: dict[str, tuple[Callable[[str], str], Refusal, str]] = {
    "another state": (lambda _: f"{CALLBACK}?code=c0de&state=other", Refusal.BAD_STATE, "got another's"),
    "no state": (lambda _: f"{CALLBACK}?code=c0de", Refusal.BAD_STATE, "got another's"),
    "two states": (lambda path: f"{path}&state=other", Refusal.BAD_STATE, "got another's"),
    "two codes": (lambda path: f"{path}&code=other", Refusal.BAD_STATE, "code: expected it once, got it again"),
    "another issuer": (lambda path: f"{path}&iss=https%3A%2F%2Fevil.example", Refusal.BAD_STATE, "iss: expected https"),
    "refused": (
        lambda path: path.replace("code=c0de", "error=access_denied&error_description=%3Cb%3Ebecause"),
        Refusal.PROVIDER_REFUSED,
        "the error access_denied",
    ),
    "refused strangely": (
        lambda path: path.replace("code=c0de", "error=%3Cscript%3E"),
        Refusal.PROVIDER_REFUSED,
        "another error",
    ),
    "no code": (lambda path: path.replace("code=c0de", "a=b"), Refusal.PROVIDER_REFUSED, "another error"),
    "a made-up code": (lambda path: path.replace("c0de", "guess"), Refusal.PROVIDER_REFUSED, "error invalid_grant"),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_an_answer_that_is_none_to_this_browser_signs_nobody_in(
    desk: Desk, browser: Browser, provider: FakeProvider, what: str
) -> None:
    change, why, problem = ANSWERS[what]
    reply = await browser.get(change(provider.authorize(await begin(browser))))
    assert reply.status == 403
    assert problem in reply.document.text
    assert reply.document.problems == []
    assert desk.refused[why] == 1
    assert SESSION not in browser.cookies
    for secret in ("because", "<script>", "s3cret", "guess"):
        assert secret not in reply.text


async def test_an_issuer_in_the_answer_is_the_providers(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    provider.discovery = lambda found: {**found, "authorization_response_iss_parameter_supported": True}
    assert (await through(browser, provider)).status == 403
    assert desk.refused[Refusal.BAD_STATE] == 1
    path = provider.authorize(await begin(browser))
    assert (await browser.get(f"{path}&iss={provider.issuer}")).status == 303


async def test_another_browsers_answer_signs_nobody_in(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    """An attacker who has their own answer opened by somebody's browser doesn't sign that in as themselves."""
    attacker = desk.browser(**HOST)
    path = provider.authorize(await begin(attacker))
    reply = await browser.get(path)
    assert reply.status == 403
    assert "expected a sign-in that this browser has begun, got none" in reply.document.text
    await begin(browser)
    assert (await browser.get(path)).status == 403
    assert desk.refused[Refusal.BAD_STATE] == 2
    assert provider.given == []


async def test_an_answer_is_good_once_even_for_a_copy_of_the_browser(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    provider.forgets_codes = False  # a provider that takes a code again
    path = provider.authorize(await begin(browser))
    copy = dict(browser.cookies)
    assert (await browser.get(path)).status == 303
    browser.cookies = copy
    assert (await browser.get(path)).status == 403
    assert len(provider.given) == 1
    assert desk.refused[Refusal.BAD_STATE] == 1


async def test_who_takes_too_long_begins_again(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    path = provider.authorize(await begin(browser))
    desk.clock.ahead += FLOW_AGE
    assert "got one that has ended" in (await browser.get(path)).document.text
    assert provider.given == []


async def test_a_cookie_of_one_kind_is_none_of_another(desk: Desk, browser: Browser) -> None:
    await begin(browser)
    browser.cookies[SESSION] = browser.cookies[FLOW]
    assert await browser.status() == 401
    assert desk.refused[Refusal.BAD_SESSION] == 1


async def test_failed_sign_ins_of_an_address_are_bounded(browser: Browser, provider: FakeProvider) -> None:
    for _ in range(BURST):
        assert (await browser.get(provider.authorize(await begin(browser)).replace("c0de", "guess"))).status == 403
    assert len(provider.given) == BURST
    reply = await through(browser, provider)
    assert reply.status == 429
    assert int(reply.headers["Retry-After"]) > 0
    assert len(provider.given) == BURST


async def test_strangers_who_fail_to_sign_in_keep_nobody_behind_the_same_proxy_out(
    desk: Desk, provider: FakeProvider
) -> None:
    """What a client claims of its address is before what the proxy has seen, which is the last one."""
    for number in range(BURST):
        stranger = desk.browser(**HOST, X_Forwarded_For=f"192.0.2.7, 198.51.100.{number}, 203.0.113.66")
        assert (await stranger.get(provider.authorize(await begin(stranger)).replace("c0de", "guess"))).status == 403
    assert (await through(desk.browser(**HOST, X_Forwarded_For="192.0.2.9, 203.0.113.66"), provider)).status == 429
    assert (await through(desk.browser(**HOST, X_Forwarded_For="192.0.2.7"), provider)).status == 303


async def test_another_sites_page_begins_no_sign_in(browser: Browser, provider: FakeProvider) -> None:
    for headers in ({"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}):
        reply = await browser.get(
            "/ui/sign-in/provider", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="document", **headers
        )
        assert reply.status == 403
    assert FLOW not in browser.cookies
    assert provider.asked == []


@pytest.mark.parametrize("path", ["https://evil.example/", "//evil.example", "/ui/../x\\y", "/metrics"])
async def test_nobody_is_sent_elsewhere_after_it(browser: Browser, provider: FakeProvider, path: str) -> None:
    reply = await browser.get(f"/ui/sign-in/provider?next={path}")
    assert (await browser.get(provider.authorize(reply.location))).location == "/ui"


# The provider is away, changes its keys, or says something else of itself.


async def test_while_the_provider_is_away_those_who_are_signed_in_stay(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    assert (await through(browser, provider)).status == 303
    provider.is_away = True
    assert await browser.status() == 200
    other = desk.browser(**HOST)
    path = provider.authorize(await begin(other))  # what it says of itself is known
    reply = await other.get(path)
    assert reply.status == 503
    assert "expected tokens, got 503" in reply.document.text
    assert desk.refused[Refusal.PROVIDER_UNAVAILABLE] == 1
    desk.clock.ahead += FRESH + 1
    browser.cookies.clear()
    await begin(other)  # used up to a day
    desk.clock.ahead += USABLE
    reply = await other.get("/ui/sign-in/provider")
    assert reply.status == 503
    assert "expected a document, got 503" in reply.document.text


async def test_a_provider_that_fails_is_not_asked_again_at_once(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    provider.is_away = True
    for _ in range(3):
        assert (await browser.get("/ui/sign-in/provider")).status == 503
    assert len(provider.asked) == 1
    desk.clock.ahead += PAUSE
    provider.is_away = False
    assert (await browser.get("/ui/sign-in/provider")).status == 303


async def test_a_new_key_is_fetched_when_a_token_names_it_but_not_twice_in_moments(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    assert (await through(browser, provider)).status == 303
    provider.key, provider.key_id = rsa.generate_private_key(65537, 2048), "k2"
    desk.clock.ahead += PAUSE
    other = desk.browser(**HOST)
    assert (await through(other, provider)).status == 303
    assert provider.asked.count("/keys") == 2
    provider.sign = lambda provider, claims: provider.signed(claims, key_id="made up")
    for _ in range(3):
        assert (await through(desk.browser(**HOST), provider)).status == 403
    assert provider.asked.count("/keys") == 2
    assert provider.asked.count("/.well-known/openid-configuration") == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"issuer": "https://evil.example"}, "issuer: expected https://127.0.0.1:"),
        ({"token_endpoint": "http://127.0.0.1/token"}, "token_endpoint: expected an https address"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "authorization_endpoint: expected an https address"),
        ({"jwks_uri": None}, "jwks_uri: expected an https address, got none"),
        (
            {"id_token_signing_alg_values_supported": ["none", "HS256"]},
            "id_token_signing_alg_values_supported: expected",
        ),
        ({"token_endpoint_auth_methods_supported": ["tls_client_auth"]}, "expected client_secret_basic or"),
    ],
)
async def test_a_provider_that_says_something_else_of_itself_signs_nobody_in(
    desk: Desk, browser: Browser, provider: FakeProvider, change: dict[str, Any], problem: str
) -> None:
    provider.discovery = lambda found: {**found, **change}
    reply = await browser.get("/ui/sign-in/provider")
    assert reply.status == 503
    assert problem in reply.document.text
    assert desk.refused[Refusal.PROVIDER_UNAVAILABLE] == 1


@pytest.mark.parametrize("answer", [lambda _: [], lambda a: without(a, "id_token"), lambda _: "x", lambda _: {"a": 1}])
async def test_an_answer_without_tokens_signs_nobody_in(
    desk: Desk, browser: Browser, provider: FakeProvider, answer: Callable[[Any], Any]
) -> None:
    provider.answer = answer
    assert (await through(browser, provider)).status in (403, 503)
    assert SESSION not in browser.cookies
    assert desk.refused.total() == 2


# Changes of the file.


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(PEOPLE, ""),
        lambda text: text.replace("client=gateway", "client=other"),
        lambda text: text.replace(" client=", "/other client="),
        lambda text: "\n".join([line for line in text.splitlines() if not line.startswith("oidc")]),
        lambda text: text.replace(" client=", " name=preferred_username client="),
        lambda text: text.replace(" client=", " groups=roles client="),
    ],
    ids=["nobody", "another client", "another issuer", "no provider", "another claim", "another claim of groups"],
)
async def test_a_session_ends_with_its_provider_or_its_line(
    desk: Desk, browser: Browser, provider: FakeProvider, change: Callable[[str], str]
) -> None:
    assert (await through(browser, provider)).status == 303
    await desk.change(change(desk.file.read_text()))
    assert await browser.status() == 401
    assert desk.refused[Refusal.SESSION_OVER] == 1


async def test_who_signs_out_is_told_that_their_session_there_goes_on(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    await through(browser, provider)
    fields = (await browser.get(PAGE)).document.forms["/ui/sign-out"]
    reply = await browser.post("/ui/sign-out", fields)
    assert f'href="{provider.issuer}/logout"' in reply.text
    assert "signed out" in reply.document.text
    assert await browser.status() == 401
    assert desk.refused[Refusal.NO_CREDENTIALS] == 2


async def test_who_signs_out_of_a_session_by_a_token_is_told_of_no_other(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    grant = Grant(name="deploys", role=AccessRole.VIEWER, digest=digest_of(TOKEN))
    await desk.change(with_token(file_text(provider), grant))
    await through(desk.browser(**HOST), provider)  # what the provider says of itself is known
    await browser.sign_in(TOKEN, Origin=ORIGIN)
    fields = (await browser.get(PAGE)).document.forms["/ui/sign-out"]
    reply = await browser.post("/ui/sign-out", fields)
    assert "signed out" in reply.document.text
    assert provider.issuer not in reply.text


async def test_on_this_machine_a_provider_that_sends_people_elsewhere_is_not_offered(desk: Desk) -> None:
    here = desk.browser()
    reply = await here.get(PAGE)
    assert "/ui/sign-in/provider" not in reply.text
    assert (await here.get("/ui/sign-in/provider")).status == 403
    assert (await here.get(f"{CALLBACK}?code=a&state=b")).status == 403


def test_google_vouches_for_the_addresses_that_it_manages() -> None:
    google = Oidc(issuer="https://accounts.google.com", client="a", secret="b")
    good = {"email": "ada@example.com", "email_verified": True}
    for claims in ({**good, "hd": "example.com"}, {**good, "email": "ada@gmail.com"}):
        assert identity_of(claims, google).name == claims["email"]
    with pytest.raises(IdTokenError, match="hd: expected the domain"):
        identity_of(good, google)


async def test_a_provider_is_asked_where_the_egress_guard_lets_it(
    tmp_path: Path, authority: Authority, provider: FakeProvider
) -> None:
    async with (
        provider_of(tmp_path, authority, provider) as client,
        desk_of(tmp_path, file_text(provider), client=client) as desk,
    ):
        client.set_guard(EgressGuard(Egress(is_private_allowed=False)))
        reply = await desk.browser(**HOST).get("/ui/sign-in/provider")
        assert reply.status == 503
        assert "refused by egress policy: 127.0.0.1 is loopback" in reply.document.text
        assert provider.asked == []


async def test_what_a_person_does_is_recorded_with_how_they_are_known(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    await through(browser, provider)
    fields = (await browser.get("/ui/destinations/ci")).document.forms["/ui/destinations/ci/pause"]
    assert (await browser.post("/ui/destinations/ci/pause", fields)).status == 303
    acts = [each async for each in read_acts(desk.company.log, desk.company.topics)]
    found = [each.record for each in acts if isinstance(each, Act)]
    assert [(each.who, each.via, each.is_proven) for each in found] == [("ada@example.com", "oidc", True)]


async def test_only_so_many_sign_ins_ask_the_provider_at_a_time(
    browser: Browser, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.access.identity_provider.AT_A_TIME", 0)
    reply = await through(browser, provider)
    assert reply.status == 503
    assert "expected few sign-ins at a time" in reply.document.text
    assert provider.given == []


async def test_no_algorithm_counts_by_which_the_secret_would_be_the_key_whatever_the_provider_says(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    provider.discovery = lambda found: {**found, "id_token_signing_alg_values_supported": ["none", "HS256", "RS256"]}
    provider.sign = by_the_clients_secret
    assert (await through(browser, provider)).status == 403
    provider.sign = unsigned
    assert (await through(browser, provider)).status == 403
    assert desk.refused[Refusal.BAD_ID_TOKEN] == 2


async def test_keys_of_several_types_may_have_one_name(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    """RFC 7517, section 4.5. Each verifies the algorithms of its own type, whichever comes first."""
    curve = ec.generate_private_key(ec.SECP256R1())
    other = {**ECAlgorithm.to_jwk(curve.public_key(), as_dict=True), "kid": provider.key_id}
    provider.keys = lambda found: {"keys": [*found["keys"], other]}
    assert (await through(browser, provider)).status == 303
    provider.keys = lambda found: {"keys": [other, *found["keys"]]}
    desk.clock.ahead = provider.ahead = FRESH
    assert (await through(desk.browser(**HOST), provider)).status == 303
    assert provider.asked.count("/keys") == 2


async def test_a_key_that_can_be_factored_proves_nothing(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    provider.key = rsa.generate_private_key(65537, 1024)

    def sign(provider: FakeProvider, claims: Claims) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyJWT's own: this is what it is about
            return provider.signed(claims)

    provider.sign = sign
    assert (await through(browser, provider)).status == 403
    assert desk.refused[Refusal.BAD_ID_TOKEN] == 1


async def test_keys_that_cant_be_had_again_are_good_for_a_day(
    desk: Desk, browser: Browser, provider: FakeProvider
) -> None:
    assert (await through(browser, provider)).status == 303
    provider.keys = lambda _: "nonsense"
    desk.clock.ahead = provider.ahead = FRESH
    assert (await through(desk.browser(**HOST), provider)).status == 303
    assert provider.asked.count("/keys") == 2
    provider.key_id = "k2"
    desk.clock.ahead += PAUSE
    reply = await through(desk.browser(**HOST), provider)
    assert reply.status == 503
    assert "/keys: expected keys (JWKS)" in reply.document.text


async def test_a_provider_without_keys_signs_nobody_in(desk: Desk, browser: Browser, provider: FakeProvider) -> None:
    provider.keys = lambda _: {"keys": []}
    assert (await through(browser, provider)).status in (403, 503)
    assert desk.refused.total() == 2
