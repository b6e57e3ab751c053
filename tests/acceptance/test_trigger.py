"""`gateway trigger` on a running gateway: every fixture is accepted, and is an event of its own each time."""

import asyncio
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from gateway.model import event_id
from gateway.ops.fixtures import Fixture, fixtures, names
from gateway.ops.fixtures.renewal import renewed
from gateway.ops.send import Sender, source_of
from gateway.ops.trigger import request_of
from gateway.rules.rules import Source
from gateway.verify.verifier import Verifier
from tests.gateway_process import GatewayProcess
from tests.ops.providers_rules import private_keys, rules

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

GATEWAY = (sys.executable, "-m", "gateway")


async def run(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def stored(gateway: GatewayProcess, log: str) -> list[dict[str, str]]:
    words = ("events", "list", "--rules", str(gateway.rules), "--log", log, "--limit", "500", "--json")
    return [json.loads(line) for line in (await run(*GATEWAY, *words)).splitlines()]


@pytest.fixture(autouse=True)
def names_are_read() -> None:
    """Read now what would block the loop of the test that happens to run first."""
    names()


@pytest.fixture
def signers(tmp_path: Path) -> Mapping[str, tuple[Source, Verifier]]:
    path = tmp_path / "of-fixtures.yaml"
    path.write_text(rules())
    return {provider: source_of(path, provider, secret=private_keys().get(provider)) for provider in names()}


@pytest.fixture
def every() -> Sequence[Fixture]:
    return fixtures()


async def test_every_fixture_is_accepted_with_its_identity_and_type(
    tmp_path: Path, signers: Mapping[str, tuple[Source, Verifier]], every: Sequence[Fixture]
) -> None:
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    expected: Counter[tuple[str, str]] = Counter()
    identified: set[str] = set()
    async with GatewayProcess(tmp_path, rules=rules(), log=log) as gateway, Sender() as sender:
        url = f"http://127.0.0.1:{gateway.port}"
        for found in every:
            source, verifier = signers[found.provider]
            for _ in range(2):
                new = renewed(found, now=time.time(), draw=random.SystemRandom())
                response = await sender.send(request_of(new, source, verifier, url=url, now=time.time()))
                assert 200 <= response.status < 300, (found.provider, found.name, response)
                count = len(new.body) if source.split == () else 1
                expected[found.provider, found.type] += count
                identified |= {event_id(found.provider, each) for each in new.identity}
    events = await stored(gateway, log)
    assert Counter((event["source"], event["type"]) for event in events) == expected
    assert identified <= {event["id"] for event in events}
    assert len({event["id"] for event in events}) == len(events)


async def test_a_trigger_is_another_event_each_time_unless_it_is_to_be_the_same(tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    async with GatewayProcess(tmp_path, rules=rules(), log=log) as gateway:
        at = ("--rules", str(gateway.rules), "--url", f"http://127.0.0.1:{gateway.port}")
        command = (*GATEWAY, "trigger", "stripe", "invoice.payment_failed", *at)
        told = [json.loads(line) for line in (await run(*command, "--count", "3", "--json")).splitlines()]
        assert [each["status"] for each in told] == [202] * 3
        assert [each["event_id"] for each in told] == [event_id("stripe", each["id"]) for each in told]
        assert len({each["id"] for each in told}) == 3
        await gateway.until("gateway_unrouted_total", 3, source="stripe")
        await gateway.until("gateway_duplicates_total", 0, source="stripe")
        for options in (("--same", "--count", "2"), ("--id", "evt_mine"), ("--id", "evt_mine")):
            told += [json.loads(line) for line in (await run(*command, *options, "--json")).splitlines()]
        assert [each["event_id"] for each in told[3:]] == [told[3]["event_id"]] * 2 + [
            event_id("stripe", "evt_mine")
        ] * 2
        await gateway.until("gateway_duplicates_total", 2, source="stripe")
    assert len(await stored(gateway, log)) == 7


async def test_the_printed_command_sends_what_is_accepted(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    async with GatewayProcess(tmp_path, rules=rules(), log=log) as gateway:
        at = ("--rules", str(gateway.rules), "--url", f"http://127.0.0.1:{gateway.port}")
        for words in (("github", "pull_request"), ("twilio", "message-status")):
            command = await run(*GATEWAY, "trigger", *words, *at, "--print", "--set", 'body.title=It\'s "$HOME"')
            assert "HTTP/1.1 202" in await run("sh", "-c", command)
    assert {event["source"] for event in await stored(gateway, log)} == {"github", "twilio"}
