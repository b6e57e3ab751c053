"""What a source hides, as an operator sees it beside a running gateway: after a reload, and after a crash."""

import asyncio
import sys
from pathlib import Path

import pytest

from gateway.index.file import IndexUnavailableError
from gateway.index.query import parse_query
from gateway.index.reading import index_to_read
from gateway.model import UsageError
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  ci: {{url: "http://127.0.0.1:1/"}}
routes:
  - {{name: build, from: github, to: ci}}
"""
).format()
CARD = "4242424242424242"
BODY = b'{"card": {"number": "%s"}, "note": "hello"}' % CARD.encode()


async def test_what_a_reload_hides_is_neither_shown_nor_found_any_more(place: LogPlace, folder: Path) -> None:
    index = folder / "index.db"
    gateway = GatewayProcess(
        folder, rules=RULES, log=place.url, prefix=place.prefix, environ={"GATEWAY_INDEX": str(index)}
    )
    async with gateway:
        status, event = await post(gateway.port, signed_post(BODY, delivery="one"))
        assert status == 202
        await until_found(index, f"{CARD} hello", 1)
        assert CARD in await shown(gateway, place, event)
        gateway.rules.write_text(hiding(RULES))
        assert "github" in (await gateway.line("index_rebuilt", timeout=20))["reason"]
        await until_found(index, CARD, 0)  # the line comes first, and then the file is made anew
        await until_found(index, "hello", 1)
        for guess in (CARD, f"body.card.number:{CARD}"):
            assert await asyncio.to_thread(found, index, guess) == 0
        told = await shown(gateway, place, event)
        assert CARD not in told
        assert '"card":"[redacted]"' in told.replace("\\", "")
        gateway.kill()
        await gateway.start()
        await post(gateway.port, signed_post(BODY, delivery="two"))
        await until_found(index, "hello", 2)
        assert await asyncio.to_thread(found, index, CARD) == 0
        assert gateway.lines("index_rebuilt") == []


def hiding(rules: str) -> str:
    before, name, after = rules.partition("github: {")
    return f"{before}{name}redact: [body.card], {after}"


def found(index: Path, query: str) -> int:
    """Return how many events a query finds, -1 while the file is made anew."""
    try:
        with index_to_read(index) as reading:
            return len(list(reading.search(parse_query(query, now=0.0), 10)))
    except (UsageError, IndexUnavailableError):
        return -1


async def until_found(index: Path, query: str, number: int) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(found, index, query) != number:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.1)


async def shown(gateway: GatewayProcess, place: LogPlace, event: str) -> str:
    """Return what `gateway events show` prints of an event."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "events", "show", event, "--json"),
        *(f"--log={place.url}", f"--topic-prefix={place.prefix}", f"--rules={gateway.rules}"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()
