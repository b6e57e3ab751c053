"""The console of a gateway as operators run it."""

import asyncio
from pathlib import Path

import aiohttp

from gateway.access.access_file import Grant, with_token
from gateway.access.principal import AccessRole
from gateway.access.tokens import digest_of, token_of
from gateway.ops.access_tokens import revoke_token
from tests.console.markup import Document
from tests.gateway_process import GatewayProcess

RULES = """
version: 1
sources:
  github: {path: /github, verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build-on-push, from: github, to: ci}
"""


async def test_a_gateway_serves_the_console_beside_its_api(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    environ = {"GATEWAY_INDEX": str(tmp_path / "index.db"), "GATEWAY_PUBLIC_URL": "https://hooks.example.com/"}
    async with (
        GatewayProcess(tmp_path, rules=RULES, log=log, environ=environ) as running,
        aiohttp.ClientSession() as client,
    ):
        base = f"http://127.0.0.1:{running.admin_port}"
        for path in ("/ui", "/ui/events", "/ui/destinations/ci", "/ui/routes/build-on-push", "/ui/rules"):
            async with client.get(base + path) as response:
                assert (response.status, response.content_type) == (200, "text/html"), path
        async with client.get(f"{base}/ui/sources/github") as response:
            assert "https://hooks.example.com/github" in await response.text()
        async with client.get(f"{base}/") as response:
            assert response.url.path == "/ui"


async def test_an_ingress_alone_has_no_console(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    environ = {"GATEWAY_ROLE": "ingress"}
    async with (
        GatewayProcess(tmp_path, rules=RULES, log=log, environ=environ) as running,
        aiohttp.ClientSession() as client,
        client.get(f"http://127.0.0.1:{running.admin_port}/ui") as response,
    ):
        assert response.status == 404


async def test_people_sign_in_to_a_gateway_and_are_out_soon_after_their_token_is_revoked(tmp_path: Path) -> None:
    token = token_of(b"\x01" * 32)
    grants = [
        Grant(name=name, role=AccessRole.OPERATOR, digest=digest)
        for name, digest in (("deploys", digest_of(token)), ("other", b"\x01" * 32))
    ]
    (tmp_path / "access.conf").write_text(with_token(with_token("", grants[0]), grants[1]))
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    environ = {"GATEWAY_ACCESS": str(tmp_path / "access.conf")}
    jar = aiohttp.CookieJar(unsafe=True)
    async with (
        GatewayProcess(tmp_path, rules=RULES, log=log, environ=environ) as running,
        aiohttp.ClientSession(cookie_jar=jar) as client,
    ):
        base = f"http://127.0.0.1:{running.admin_port}"
        async with client.get(f"{base}/ui/rules") as response:
            assert response.status == 401
            fields = Document(await response.text()).forms["/ui/sign-in"]
        async with client.post(f"{base}/ui/sign-in", data={**fields, "credential": token}) as response:
            assert (response.status, response.url.path) == (200, "/ui/rules")
        async with client.get(f"{base}/metrics") as response:
            assert 'gateway_access_sign_ins_total{how="token_session"} 1.0' in await response.text()
        await asyncio.to_thread(revoke_token, tmp_path / "access.conf", "deploys")
        async with asyncio.timeout(20):
            while True:
                async with client.get(f"{base}/ui/rules") as response:
                    if response.status == 401:
                        assert "Your session has ended" in await response.text()
                        break
                await asyncio.sleep(0.2)
