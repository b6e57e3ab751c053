"""Who may ask a running gateway, by a file that changes meanwhile, and what is told of who did what."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest

from gateway.access.access_file import Grant
from gateway.access.principal import AccessRole
from gateway.access.tokens import digest_of, token_of
from gateway.ops.access_tokens import add_token, revoke_token
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import GatewayProcess

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

SENDING = RULES.format(first="http://127.0.0.1:1/", second="http://127.0.0.1:1/")
TOKENS = {role: token_of(bytes([number]) * 32) for number, role in enumerate(AccessRole)}


def give(file: Path) -> None:
    for role, token in TOKENS.items():
        add_token(file, Grant(name=f"a-{role}", role=role, digest=digest_of(token)))


async def test_tokens_say_who_may_do_what_until_they_are_revoked(embedded_place: LogPlace, folder: Path) -> None:
    file = folder / "access.conf"
    await asyncio.to_thread(give, file)
    environ = {"GATEWAY_ACCESS": str(file), "GATEWAY_INDEX": str(folder / "index.db")}
    gateway = GatewayProcess(
        folder, rules=SENDING, log=embedded_place.url, prefix=embedded_place.prefix, environ=environ
    )
    async with gateway, aiohttp.ClientSession(f"http://127.0.0.1:{gateway.admin_port}") as session:

        async def asked(method: str, path: str, token: str | None, **fields: object) -> int:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            async with session.request(method, f"/api/v1{path}", headers=headers, json=fields or None) as response:
                return response.status

        async def listed() -> list[int]:
            return [await asked("GET", "/destinations", token) for token in (None, *TOKENS.values())]

        assert await listed() == [401, 200, 200, 200]
        async with session.get("/readyz") as response:  # as ever, it asks nobody who they are
            assert response.status == 200
        pauses = [
            await asked("POST", "/destinations/first/pause", token, reason="why not") for token in TOKENS.values()
        ]
        assert pauses == [403, 403, 202]
        (act,) = await acts(embedded_place)
        assert (act["who"], act["via"], act["proven"], act["from"]) == ("a-operator", "token", True, "127.0.0.1")
        assert (act["what"], act["on"], act["why"], act["outcome"]) == (
            *("pause", "destination/first", "why not"),
            "accepted",
        )
        await asyncio.to_thread(revoke_token, file, "a-reader")
        await gateway.line("access_file_read")
        assert await listed() == [401, 200, 401, 200]
        file.write_text("nonsense")
        problems = (await gateway.line("access_file_refused"))["problems"]
        expected = "token, person, group, sign-in or oidc"
        assert problems == [f"{file}:1: unknown kind of line; expected {expected}"]
        async with session.get("/readyz") as response:
            assert "access: " in await response.text()
        assert await listed() == [401, 200, 401, 200]
        metrics = await gateway.metrics()
        assert metrics.sum("gateway_access_refused_total") == 5


async def acts(place: LogPlace) -> list[dict[str, object]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "audit", "list", "--json"),
        *(f"--log={place.url}", f"--topic-prefix={place.prefix}"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


async def test_a_gateway_does_not_start_with_an_access_file_that_it_cant_read(
    embedded_place: LogPlace, folder: Path
) -> None:
    environ = {"GATEWAY_ACCESS": str(folder / "access.conf")}
    gateway = GatewayProcess(
        folder, rules=SENDING, log=embedded_place.url, prefix=embedded_place.prefix, environ=environ
    )
    gateway.spawn()
    assert await gateway.ended(timeout=20) == 2
    assert "expected an access file, got: no such file or directory" in gateway.story()
