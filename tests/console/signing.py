"""A console on which people sign in by an access file, browsers that look at it, and a provider that may be hostile."""

import asyncio
import base64
import hashlib
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import jwt
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from gateway.access.access import Access, Refusal
from gateway.access.identity_provider import IdentityProvider
from gateway.access.sign_in import SignIn
from gateway.api.application import add_api
from gateway.api.backend import Backend
from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.console.application import add_console
from gateway.rules.rules import Egress, Rules
from gateway.settings import AccessSettings
from tests.api.conftest import SINCE, rules_of
from tests.certificates import Authority
from tests.console.conftest import read_assets
from tests.console.markup import Document
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

ORIGIN = "https://gateway.example.com"
HOST = {"Host": "gateway.example.com"}
PAGE = "/ui/rules"
CALLBACK = "/ui/sign-in/callback"


class Clock:
    """The real time, and what a test adds to it: tokens of a provider that we did not write have real times."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class Desk:
    """A console with its access file. `refused` counts who wasn't let in by the reason, `signed_in` who was by how."""

    base: str
    file: Path
    access: Access
    clock: Clock
    refused: Counter[Refusal]
    signed_in: Counter[str]
    sign_in: SignIn
    session: aiohttp.ClientSession
    company: Company

    def browser(self, **headers: str) -> "Browser":
        """Return a browser on this machine, or elsewhere by its headers."""
        return Browser(self, headers)

    async def change(self, text: str) -> None:
        """Change the file, and have it read."""
        self.file.write_text(text)
        await asyncio.to_thread(self.access.load)


@dataclass
class Reply:
    """What a browser got."""

    status: int
    text: str
    headers: Mapping[str, str]
    cookies: list[str]

    @property
    def location(self) -> str:
        return self.headers.get("Location", "")

    @property
    def document(self) -> Document:
        return Document(self.text)


class Browser:
    """Keeps cookies as a browser does, and sends all of them; so much of its rules as we rely on Chromium tests."""

    def __init__(self, desk: Desk, headers: Mapping[str, str]) -> None:
        self.desk = desk
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.cookies: dict[str, str] = {}

    async def get(self, path: str, **headers: str) -> Reply:
        return await self._request("GET", path, None, headers)

    async def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Reply:
        return await self._request("POST", path, fields, headers)

    async def sign_in(self, token: str, *, page: str = "/ui/sign-in", **headers: str) -> Reply:
        """Fill in the form of a page that has one."""
        document = (await self.get(page)).document
        return await self.post("/ui/sign-in", {**document.forms["/ui/sign-in"], "credential": token}, **headers)

    async def status(self, path: str = PAGE) -> int:
        return (await self.get(path)).status

    async def _request(
        self, method: str, path: str, fields: Mapping[str, str] | None, headers: Mapping[str, str]
    ) -> Reply:
        sent = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if self.cookies:
            sent["Cookie"] = "; ".join([f"{name}={value}" for name, value in self.cookies.items()])
        async with self.desk.session.request(
            method, f"{self.desk.base}{path}", data=fields, headers=sent, allow_redirects=False
        ) as response:
            text = await response.text()
            cookies = response.headers.getall("Set-Cookie", [])
            for each in cookies:
                name, _, rest = each.partition("=")
                value = rest.partition(";")[0].strip('"')
                if "max-age=0" in each.lower():
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = value
            return Reply(response.status, text, dict(response.headers), cookies)


@asynccontextmanager
async def desk_of(
    folder: Path, text: str, *, client: Client | None = None, tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Desk]:
    """Serve a console with an access file, and a client by which a provider is asked."""
    company = await Company.found(MemoryLog(now=Ticking()))
    rules, assets = await asyncio.to_thread(_rules), await asyncio.to_thread(read_assets)
    file, clock, refused = folder / "access.conf", Clock(), Counter[Refusal]()
    file.write_text(text)

    def count(why: Refusal) -> None:
        refused[why] += 1

    access = Access(AccessSettings(file=file), refused=count, clock=clock, environ={"OIDC_SECRET": "s3cret"})
    await asyncio.to_thread(access.load)
    backend = Backend(
        log=company.log,
        topics=company.topics,
        rules=lambda: rules,
        rules_status=lambda: {
            "file": "routes.yaml",
            "loaded_at": SINCE,
            "changed": (),
            "refused": False,
            "refusal": None,
        },
    )

    async def open_client() -> Client:
        assert client is not None
        return client

    application, logger = web.Application(), structlog.get_logger()
    provider = None if client is None else IdentityProvider(open_client, clock=clock)
    signed_in = Counter[str]()

    def count_sign_in(how: str) -> None:
        signed_in[how] += 1

    add_api(application, backend, access, logger)
    sign_in = SignIn(access, identity_provider=provider, on_sign_in=count_sign_in, clock=clock)
    add_console(application, assets, backend, sign_in, logger)
    async with AsyncExitStack() as stack:
        server = TestServer(application, scheme="https" if tls else "http", port=port)
        await server.start_server(ssl=tls)
        stack.push_async_callback(server.close)
        session = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        base = f"{'https' if tls else 'http'}://127.0.0.1:{server.port}"
        yield Desk(base, file, access, clock, refused, signed_in, sign_in, session, company)


@cache
def _rules() -> Rules:
    with TemporaryDirectory() as folder:
        return rules_of(Path(folder) / "routes.yaml")


@dataclass
class FakeProvider:
    """A provider of OpenID Connect that says what a test wants. `asked` are the paths that it was asked for."""

    port: int = 0
    key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    key_id: str = "k1"
    email: str = "ada@example.com"
    claims: Callable[[dict[str, Any]], dict[str, Any]] = lambda claims: claims
    sign: Callable[["FakeProvider", dict[str, Any]], str] | None = None
    discovery: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document
    answer: Callable[[dict[str, Any]], Any] = lambda answer: answer
    is_away: bool = False
    ahead: float = 0.0
    """Seconds by which its clock is ahead of the real one."""
    keys: Callable[[dict[str, Any]], Any] = lambda keys: keys
    forgets_codes: bool = True
    asked: list[str] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    given: list[dict[str, str]] = field(default_factory=list)
    """What the token endpoint was sent."""

    @property
    def issuer(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def authorize(self, location: str, code: str = "c0de") -> str:
        """Return where somebody is sent back to, who has been sent here and has signed in."""
        asked = dict(parse_qsl(urlsplit(location).query))
        self.codes[code] = asked
        return f"{CALLBACK}?code={code}&state={asked['state']}"

    def signed(self, claims: Mapping[str, Any], *, algorithm: str = "RS256", key_id: str | None = None) -> str:
        headers = {"kid": self.key_id if key_id is None else key_id}
        return jwt.encode(dict(claims), self.key, algorithm=algorithm, headers=headers)

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        if self.is_away:
            return web.Response(status=503)
        match request.path:
            case "/.well-known/openid-configuration":
                return web.json_response(self.discovery(self._document()))
            case "/keys":
                public = RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
                return web.json_response(self.keys({"keys": [{**public, "kid": self.key_id, "use": "sig"}]}))
            case "/token":
                return await self._token(request)
            case _:
                return web.Response(status=404)

    async def _token(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        form["authorization"] = request.headers.get("Authorization", "")
        self.given.append(form)
        asked = self.codes.pop(form["code"], None) if self.forgets_codes else self.codes.get(form["code"])
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=")
        if (
            asked is None
            or asked["code_challenge"] != challenge.decode()
            or asked["redirect_uri"] != form["redirect_uri"]
        ):
            return web.json_response({"error": "invalid_grant", "error_description": "<b>s3cret</b>"}, status=400)
        now = int(time.time() + self.ahead)
        claims = self.claims(
            {
                "iss": self.issuer,
                "sub": "248289761001",
                "aud": asked["client_id"],
                "exp": now + 300,
                "iat": now,
                "nonce": asked["nonce"],
                "email": self.email,
                "email_verified": True,
                "at_hash": half_hash("acc3ss"),
            }
        )
        token = self.signed(claims) if self.sign is None else self.sign(self, claims)
        answer = {"access_token": "acc3ss", "token_type": "Bearer", "expires_in": 300, "id_token": token}
        return web.json_response(self.answer(answer))

    def _document(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "end_session_endpoint": f"{self.issuer}/logout",
            "id_token_signing_alg_values_supported": ["RS256"],
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
        }


def half_hash(token: str) -> str:
    """Return `at_hash` of a token that is signed with RS256."""
    return base64.urlsafe_b64encode(hashlib.sha256(token.encode()).digest()[:16]).rstrip(b"=").decode()


@asynccontextmanager
async def provider_of(folder: Path, authority: Authority, provider: FakeProvider) -> AsyncIterator[Client]:
    """Serve a provider with TLS, and yield a client that trusts it."""
    server = TestServer(_application(provider), scheme="https")
    await server.start_server(ssl=authority.server(folder, "127.0.0.1"))
    assert server.port is not None
    provider.port = server.port
    try:
        async with trusting(authority) as client:
            yield client
    finally:
        await server.close()


@asynccontextmanager
async def trusting(authority: Authority) -> AsyncIterator[Client]:
    """Yield a client that trusts an authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.pem)
    async with Client(EgressGuard(Egress()), tls=context) as client:
        yield client


def _application(provider: FakeProvider) -> web.Application:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", provider.handle)
    return application
