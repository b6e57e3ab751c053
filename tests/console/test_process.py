"""The console of a gateway as operators run it."""

from pathlib import Path

import aiohttp

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
    environ = {"GATEWAY_INDEX": str(tmp_path / "index.db")}
    async with (
        GatewayProcess(tmp_path, rules=RULES, log=log, environ=environ) as running,
        aiohttp.ClientSession() as client,
    ):
        base = f"http://127.0.0.1:{running.admin_port}"
        for path in ("/ui", "/ui/events", "/ui/destinations/ci", "/ui/routes/build-on-push", "/ui/rules"):
            async with client.get(base + path) as response:
                assert (response.status, response.content_type) == (200, "text/html"), path
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
