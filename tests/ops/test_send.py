"""Events as their providers would send them."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from yarl import URL

from gateway.model import RefusedError, RulesError, UsageError
from gateway.ops.send import Sender, Signed, ask_status, sample, sign, source_of
from gateway.verify.request import Request

NOW = 1_700_000_000.0
RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}", "${OLD_SECRET}"]}}
  stripe: {path: /in/billing, verify: {scheme: stripe, secrets: [whsec_s]}}
  standard: {verify: {scheme: standard-webhooks, secrets: [whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0]}}
  gitlab: {verify: {scheme: gitlab, secrets: [token]}}
  header: {verify: {scheme: token, header: X-Token, secrets: [s]}}
  query: {verify: {scheme: token, query: key, secrets: ["a b&c"]}}
  basic: {verify: {scheme: basic, username: u, secrets: [p]}}
  bearer: {verify: {scheme: bearer, secrets: [b]}}
  open: {verify: {scheme: none}}
destinations: {ci: {url: "http://127.0.0.1:1/"}}
routes: [{name: r, from: github, to: ci}]
"""
SIGNING = ("github", "stripe", "standard", "gitlab", "header", "query", "basic", "bearer")


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECRET", "it's a secret")
    monkeypatch.delenv("OLD_SECRET", raising=False)
    path = tmp_path / "routes.yaml"
    path.write_text(RULES)
    return path


def signed(
    rules: Path,
    name: str,
    *,
    url: str = "http://127.0.0.1:8080",
    secret: str | None = None,
    is_forged: bool = False,
    headers: dict[str, str] | None = None,
) -> Signed:
    source, verifier = source_of(rules, name, secret=secret)
    return sign(
        source, verifier, url=url, body=b"{}", id="1", type="push", headers=headers or {}, now=NOW, is_forged=is_forged
    )


def verify(rules: Path, name: str, sent: Signed) -> None:
    source, _ = source_of(rules, name, secret=None)
    headers = tuple([(key.encode(), value.encode()) for key, value in sent.headers])
    request = Request(
        method="POST", path=sent.url.raw_path, query=sent.url.raw_query_string, headers=headers, body=sent.body
    )
    source.verifier.verify(request, now=NOW)


@pytest.mark.parametrize("name", [*SIGNING, "open"])
def test_a_signed_request_is_verified(rules: Path, name: str) -> None:
    verify(rules, name, signed(rules, name))
    verify(rules, name, signed(rules, name, url="http://127.0.0.1:8080/elsewhere?a=%20b"))


@pytest.mark.parametrize("name", SIGNING)
def test_a_forged_request_is_refused(rules: Path, name: str) -> None:
    with pytest.raises(RefusedError, match=r"^401 "):
        verify(rules, name, signed(rules, name, is_forged=True))


def test_a_source_without_verification_has_no_forgery(rules: Path) -> None:
    with pytest.raises(UsageError, match=r"--forge: expected a source that verifies"):
        signed(rules, "open", is_forged=True)


@pytest.mark.parametrize("name", ["github", "stripe", "header", "basic"])
def test_a_given_secret_is_taken_instead_of_the_rules_own(rules: Path, name: str) -> None:
    with pytest.raises(RefusedError, match=r"^401 "):
        verify(rules, name, signed(rules, name, secret="another"))
    verify(rules, "github", signed(rules, "github", secret="it's a secret"))


def test_a_secret_that_cannot_be_resolved_is_asked_for(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = signed(rules, "github")
    monkeypatch.delenv("SECRET")
    with pytest.raises(UsageError, match=r"variable SECRET isn't set; --secret takes it, too$"):
        signed(rules, "github")
    assert signed(rules, "github", secret="it's a secret") == sent
    signed(rules, "stripe")  # whose secret is there


IN_BODY = """
version: 1
sources:
  adyen: {verify: {scheme: adyen, secrets: [44782DEF547AAA06C910C43932B1EB0C71FC68D9D0C057550C48EC2ACF6BA056]}}
  linear: {verify: {scheme: linear, secrets: [a-secret-of-some-length]}}
  meta: {verify: {scheme: hmac, field: meta.signature, secrets: [a-secret-of-some-length], signed: "{field:meta.id}"}}
  keyed: {verify: {scheme: public-key, algorithm: ed25519, header: X-Sig, public_keys: ["KEY"]}}
destinations: {}
routes: []
"""
SECRET_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def in_body(tmp_path: Path) -> Path:
    path = tmp_path / "routes.yaml"
    path.write_text(IN_BODY.replace("KEY", SECRET_KEY.public_key().public_bytes_raw().hex()))
    return path


def of_body(rules: Path, name: str, body: bytes, *, is_forged: bool = False, secret: str | None = None) -> Signed:
    source, verifier = source_of(rules, name, secret=secret)
    return sign(
        source,
        verifier,
        url="http://127.0.0.1:1",
        body=body,
        id="1",
        type="t",
        headers={},
        now=NOW,
        is_forged=is_forged,
    )


def test_what_a_provider_signs_into_the_body_is_written_there(in_body: Path) -> None:
    body = b'{"notificationItems":[{"NotificationRequestItem":{"pspReference":"1","merchantAccountCode":"M","amount":'
    body += b'{"value":1,"currency":"EUR"},"eventCode":"CAPTURE","success":"true","additionalData":{}}}]}'
    for name, sent in (("adyen", body), ("meta", b'{"meta": {"id": 7, "signature": "stale"}}'), ("linear", b"{}")):
        verify(in_body, name, of_body(in_body, name, sent))
        with pytest.raises(RefusedError, match=r"^401 bad_signature"):
            verify(in_body, name, of_body(in_body, name, sent, is_forged=True))
    assert of_body(in_body, "linear", b"{}").body == b'{"webhookTimestamp":1700000000000}'
    assert of_body(in_body, "linear", b'{"webhookTimestamp":""}').body == b'{"webhookTimestamp":"1700000000000"}'


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b"{}", b'{"meta":[]}', b'{"meta":{"id":[]}}'])
def test_a_body_without_a_place_for_its_signature_is_reported(in_body: Path, body: bytes) -> None:
    with pytest.raises(UsageError, match=r"^a test event for this source: expected "):
        of_body(in_body, "meta", body)


def test_a_private_key_of_ones_own_signs(in_body: Path) -> None:
    pem = SECRET_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    verify(in_body, "keyed", of_body(in_body, "keyed", b"{}", secret=pem))
    with pytest.raises(RefusedError, match=r"^401 bad_signature"):
        verify(in_body, "keyed", of_body(in_body, "keyed", b"{}", secret=pem, is_forged=True))
    with pytest.raises(UsageError, match=r"give yours as --secret, in PEM$"):
        of_body(in_body, "keyed", b"{}")
    with pytest.raises(
        UsageError, match=r"^--secret: expected the private key of an Ed25519 public key in PEM"
    ) as error:
        of_body(in_body, "keyed", b"{}", secret="hush")
    assert "hush" not in str(error.value)


def test_a_source_in_an_included_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text("version: 1\ninclude: more.yaml\n")
    (tmp_path / "more.yaml").write_text(RULES.replace("version: 1\n", ""))
    verify(tmp_path / "routes.yaml", "stripe", signed(tmp_path / "routes.yaml", "stripe", secret="whsec_s"))


def test_a_given_header_is_sent_and_signed(rules: Path) -> None:
    sent = signed(rules, "standard", headers={"webhook-id": "mine", "content-type": "text/plain"})
    headers = dict(sent.headers)
    assert (headers["webhook-id"], headers["content-type"]) == ("mine", "text/plain")
    assert "Content-Type" not in headers
    verify(rules, "standard", sent)


def test_a_url_without_a_path_gets_the_sources(rules: Path) -> None:
    assert str(signed(rules, "stripe").url) == "http://127.0.0.1:8080/in/billing"
    assert str(signed(rules, "query", url="http://h/x?a=1").url) == "http://h/x?a=1&key=a%20b%26c"


def test_a_secret_path_is_used_or_asked_for(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules.write_text(RULES.replace("/in/billing", "'/in/${HOOK}'"))
    with pytest.raises(UsageError, match=r"^--url: expected one with a path, as /in/\$\{HOOK\} isn't known here, got"):
        signed(rules, "stripe")
    assert str(signed(rules, "stripe", url="http://h/x").url) == "http://h/x"
    monkeypatch.setenv("HOOK", "of-billing")
    assert str(signed(rules, "stripe").url) == "http://127.0.0.1:8080/in/of-billing"


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1/", "http://", "http://[::1/"])
def test_an_invalid_url_is_reported(rules: Path, url: str) -> None:
    with pytest.raises(UsageError, match=r"^--url: expected http://host:port/path, got "):
        signed(rules, "github", url=url)


def test_an_unknown_source_is_reported_with_the_nearest(rules: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown source 'strip', did you mean 'stripe'[?]"):
        source_of(rules, "strip", secret=None)


def test_rules_with_errors_are_reported(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=r"none\.yaml: expected a file"):
        source_of(tmp_path / "none.yaml", "github", secret=None)


def test_a_sample_has_id_and_type_where_schemes_look_for_them() -> None:
    assert sample("1", "push") == b'{"id":"1","type":"push","test":true}'


async def test_the_response_is_printed() -> None:
    seen: list[tuple[bytes, str]] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append((await request.read(), request.raw_path))
        if len(seen) == 1:
            return web.Response(status=202, body=b'{"id":"evt_1"}', headers={"gateway-event-id": "evt_1"})
        return web.json_response({"title": "Unauthorized", "detail": "expected a signature"}, status=401)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = URL(f"http://127.0.0.1:{runner.addresses[0][1]}/in/x%2fy?a=%20b", encoded=True)
    try:
        async with Sender() as sender:
            answers = [await sender.send(Signed(url=url, headers=(), body=b"{ }")) for _ in range(2)]
    finally:
        await runner.cleanup()
    assert seen == [(b"{ }", "/in/x%2fy?a=%20b")] * 2
    assert [(told.status, told.event_id, told.detail) for told in answers] == [
        (202, "evt_1", ""),
        (401, None, "expected a signature"),
    ]
    assert all(0 < told.seconds < 5 for told in answers)


async def test_no_answer_is_a_connection_error() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with Sender() as sender:
        with pytest.raises(ConnectionError):
            await sender.send(Signed(url=URL(f"http://127.0.0.1:{port}/"), headers=(), body=b""))
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionError, match="connection refused"):
            await sender.send(Signed(url=URL(f"http://127.0.0.1:{port}/"), headers=(), body=b""))


@pytest.mark.parametrize(
    ("status", "text", "got"),
    [
        (404, '{"version": "1", "rules": {}}', "HTTP 404"),
        (302, "", "HTTP 302"),
        (200, "<html>", "something else"),
        (200, '{"status": "success"}', "something else"),
        (200, '{"version": "1", "rules": {}}', None),
    ],
)
async def test_only_a_gateways_status_is_taken_for_one(status: int, text: str, got: str | None) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path != "/status":
            return web.Response(text='{"version": "1", "rules": {}}')
        return web.Response(status=status, text=text, headers={"Location": "/elsewhere"})

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        if got is None:
            assert (await ask_status(address))["version"] == "1"
        else:
            with pytest.raises(ConnectionError, match=f"expected the status of a gateway, got {got}$"):
                await ask_status(address)
    finally:
        await runner.cleanup()
    with pytest.raises(ConnectionError, match=r"^connection refused$"):
        await ask_status(address)
