"""The examples of docs/api.md, on a gateway as operators run it."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from tests.gateway_process import GatewayProcess
from tests.sink import Sink

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\$ ((?:timeout 2 )?curl .*)$", DOCUMENT, re.MULTILINE)
RULES = """
version: 1
sources:
  github: {{path: /github, verify: {{scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}}}
destinations:
  ci: {{url: "{url}"}}
routes:
  - {{name: build-on-push, from: github, to: ci}}
"""
EVENT = {"ref": "refs/heads/main"}


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    async with Sink() as sink:
        rules = RULES.format(url=sink.url)
        environ = {"GATEWAY_INDEX": str(tmp_path / "index.db")}
        log = f"sqlite:///{tmp_path / 'gateway.db'}"
        async with GatewayProcess(tmp_path, rules=rules, log=log, environ=environ) as running:
            yield running


async def shell(command: str, gateway: GatewayProcess, **environ: str) -> bytes:
    """Run a command of the document, of a gateway at another address; it has to succeed."""
    at = command.replace("127.0.0.1:9090", f"127.0.0.1:{gateway.admin_port}")
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", at, env={"PATH": "/usr/bin:/bin", **environ}, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, (command, process.returncode, gateway.story())
    assert b'"about:blank"' not in out, (command, out)
    return out


async def sent(gateway: GatewayProcess) -> str:
    """Send an event, wait until the index has it, and return its id."""
    post = f"curl -s -H 'X-Token: a-secret-of-16-bytes' --json '{orjson.dumps(EVENT).decode()}'"
    answer = orjson.loads(await shell(f"{post} http://127.0.0.1:{gateway.port}/github", gateway))
    await gateway.until("gateway_index_events", 1)
    return str(answer["id"])


async def test_the_examples_of_the_document_work(gateway: GatewayProcess) -> None:
    event = await sent(gateway)
    assert len(EXAMPLES) > 10
    for example in EXAMPLES:
        out = await shell(example, gateway, EVENT=event)
        if "/tail" in example:
            assert out.startswith(b"id: "), out
            continue
        answer = orjson.loads(out)
        if example.endswith("/body"):
            assert answer == EVENT


async def test_a_role_of_its_own_has_no_api(tmp_path: Path) -> None:
    """Who may reach the admin address of an ingress for its metrics finds nothing more there."""
    rules = RULES.format(url="http://127.0.0.1:1/")
    environ = {"GATEWAY_ROLE": "ingress"}
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    async with GatewayProcess(tmp_path, rules=rules, log=log, environ=environ) as running:
        out = await shell("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:9090/api/v1/me | grep 404", running)
        assert out.strip() == b"404"
