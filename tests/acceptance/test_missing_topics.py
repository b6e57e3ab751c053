"""Topics that are deleted under gateways as they run in production, without `--dev`: what that stops, and what not."""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from gateway.log.topics import Topics
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import SECRET, post, signed_post
from tests.sink import Sink

RULES = (
    SOURCES
    + """
  other: {{verify: {{scheme: github, secrets: ["{secret}"]}}}}
  keyed: {{verify: {{scheme: github, secrets: ["{secret}"]}}, key: '"k"'}}
{more}
destinations:
  first: {{url: "{url}"}}
routes:
  - {{name: all, from: [github, other], to: first}}
  - {{name: in-order, from: keyed, order: key, to: first}}
"""
)
MORE = f'  more: {{verify: {{scheme: github, secrets: ["{SECRET}"]}}}}'
TOLD = 30.0
"""Seconds within which a process tells that a topic is missing, or there again: each step of it takes 5."""

pytestmark = [pytest.mark.timeout(180), pytest.mark.rotated(share=1 / 10, group="acceptance")]


async def command(place: LogPlace, rules: Path, *words: str) -> tuple[int, str]:
    """Run a command beside the gateways; return its exit code, and what it prints."""
    where = ("--rules", str(rules), "--log", place.url, "--topic-prefix", place.prefix)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *words, *where, cwd=ROOT, stdout=PIPE, stderr=PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (output or errors).decode()


async def delete(place: LogPlace, topics: Collection[str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.servers)
    await admin.start()
    try:
        await admin.delete_topics(list(topics))
    finally:
        await admin.close()


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    end = time.monotonic() + TOLD
    while not await holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


async def warns_of(process: GatewayProcess, topics: Collection[str]) -> None:
    """Wait until a process has said of just these topics that it misses them."""
    problem = "expected a topic, got none; run `gateway topics create`"
    end = time.monotonic() + TOLD
    while (
        warned := {line["topic"] for line in process.lines("topic_misconfigured") if line["problem"] == problem}
    ) != topics:
        assert time.monotonic() < end, warned
        await asyncio.sleep(0.1)


class Fleet:
    """An ingress and a router, which are asked all the while whether they are ready."""

    def __init__(self, place: LogPlace, folder: Path, rules: str) -> None:
        self.processes = []
        for role in ("ingress", "router"):
            (folder / role).mkdir()
            process = GatewayProcess(
                folder / role,
                rules=rules,
                log=place.url,
                prefix=place.prefix,
                environ={"GATEWAY_ROLE": role},
                is_dev=False,
            )
            self.processes.append(process)
        self.ingress, self.router = self.processes

    async def keep_asking(self) -> None:
        while True:
            for process in self.processes:
                ready = await process.readiness()
                assert ready["ready"], ready
                assert (await process.metrics()).sum("gateway_log_up") == 1
            await asyncio.sleep(0.2)

    async def are_told(self, topics: Collection[str]) -> bool:
        """Return whether all of them say of just these topics that they are missing."""
        for process in self.processes:
            unread = (await process.readiness()).get("unread", ())
            if {(each["topic"], each["reason"]) for each in unread} != {(topic, "no such topic") for topic in topics}:
                return False
            metrics = await process.metrics()
            name, of = "gateway_log_partition_unavailable_seconds", {"partition": "all"}
            if not all(metrics.sum(name, topic=topic, **of) > 0 for topic in topics):
                return False
        return True


@pytest.mark.full
async def test_deleted_topics_stop_nothing_else_and_are_used_again_once_recreated(
    kafka_place: LogPlace, folder: Path
) -> None:
    place, topics = kafka_place, Topics(kafka_place.prefix)
    gone = {topics.retry("20h"), topics.dead, topics.events("other"), topics.ordered("in-order", "first")}
    async with Sink(200) as sink:
        rules = RULES.format(secret=SECRET, url=sink.url, more="")
        fleet = Fleet(place, folder, rules)
        assert (await command(place, fleet.ingress.rules, "topics", "create"))[0] == 0
        async with fleet.ingress, fleet.router, asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(fleet.keep_asking())

            async def send(source: str, number: int) -> int:
                request = signed_post(b"{}", delivery=f"{source}{number}", path=f"/in/{source}")
                return (await post(fleet.ingress.port, request))[0]

            assert await send("github", 0) == await send("other", 0) == 202
            assert await send("keyed", 0) == 202
            await sink.received(3, timeout=20)
            await delete(place, gone)
            refused = tasks.create_task(send("other", 1))
            assert await send("github", 1) == await send("keyed", 1) == 202
            await sink.received(4, timeout=20)
            assert await refused == 503
            await until(lambda: fleet.are_told(gone))
            for process in fleet.processes:
                await process.line("partitions_unavailable", timeout=TOLD)
                assert process.is_running
            assert await send("other", 2) == 503

            addresses = [f"--admin=127.0.0.1:{process.admin_port}" for process in fleet.processes]
            for asked in ([], addresses):
                code, output = await command(place, fleet.ingress.rules, "status", "--json", *asked)
                found = [json.loads(line) for line in output.splitlines()]
                told = {each["what"] for each in found if each["next"] == ["gateway topics create"]}
                assert (code, told) == (1, gone)

            for process in fleet.processes:
                process.rules.write_text(RULES.format(secret=SECRET, url=sink.url, more=MORE))
                reloaded = await process.line("rules_reloaded", timeout=TOLD)
                assert reloaded["added"] == ["source more"]
            assert await send("more", 0) == 202
            asking.cancel()

            for process in fleet.processes:
                assert await process.stop() == 0
                await process.start()
                await warns_of(process, gone)
            asking = tasks.create_task(fleet.keep_asking())
            await until(lambda: fleet.are_told(gone))
            assert await send("github", 2) == 202
            assert await send("other", 3) == 503
            await sink.received(5, timeout=20)

            assert (await command(place, fleet.ingress.rules, "topics", "create"))[0] == 0
            await until(lambda: fleet.are_told(()))

            async def is_accepted() -> bool:
                return await send("other", 4) == 202

            await until(is_accepted)
            await sink.received(7, timeout=TOLD)  # and what has waited for the topic of the ordered route
            asking.cancel()
            for process in fleet.processes:
                assert await process.stop() == 0


@pytest.mark.full
async def test_a_deleted_control_topic_ends_no_process_and_works_once_recreated(
    kafka_place: LogPlace, folder: Path
) -> None:
    place, topics = kafka_place, Topics(kafka_place.prefix)
    async with Sink(200) as sink:
        fleet = Fleet(place, folder, RULES.format(secret=SECRET, url=sink.url, more=""))
        assert (await command(place, fleet.ingress.rules, "topics", "create"))[0] == 0
        async with fleet.router, fleet.ingress:

            async def send(number: int) -> None:
                assert (await post(fleet.ingress.port, signed_post(b"{}", delivery=f"{number}")))[0] == 202

            async def run(*words: str) -> None:
                code, output = await command(place, fleet.ingress.rules, "destination", *words, "first")
                assert code == 0, output

            await run("pause")
            await run("resume")
            await delete(place, [topics.control])
            await until(lambda: fleet.are_told([topics.control]))
            await send(1)
            await sink.received(1, timeout=20)
            assert (await command(place, fleet.ingress.rules, "topics", "create"))[0] == 0
            await until(lambda: fleet.are_told(()))
            await run("pause")
            await fleet.router.until("gateway_destination_paused", 1, destination="first")
            await send(2)
            await fleet.router.until("gateway_parked_backlog", 1)
            assert len(sink.requests) == 1
            await run("resume")
            await sink.received(2, timeout=20)
            for process in fleet.processes:
                assert await process.stop() == 0


async def test_processes_start_and_serve_though_topics_are_missing(kafka_place: LogPlace, folder: Path) -> None:
    place, topics = kafka_place, Topics(kafka_place.prefix)
    gone = {topics.retry("20h"), topics.dedupe, topics.events("other")}
    async with Sink(200) as sink:
        fleet = Fleet(place, folder, RULES.format(secret=SECRET, url=sink.url, more=""))
        assert (await command(place, fleet.ingress.rules, "topics", "create"))[0] == 0
        await delete(place, gone)
        async with fleet.router, fleet.ingress:
            for process in fleet.processes:
                await warns_of(process, gone)
            statuses = {}
            for source in ("github", "other"):
                statuses[source], _ = await post(
                    fleet.ingress.port, signed_post(b"{}", delivery=source, path=f"/in/{source}")
                )
            assert statuses == {"github": 202, "other": 503}
            await sink.received(1, timeout=20)
            await until(lambda: fleet.are_told(gone))
            assert all([(await process.readiness())["ready"] for process in fleet.processes])


async def test_a_log_on_which_the_gateway_was_never_set_up_is_refused_with_the_command_that_sets_it_up(
    kafka_place: LogPlace, folder: Path
) -> None:
    fleet = Fleet(kafka_place, folder, RULES.format(secret=SECRET, url="http://127.0.0.1:1/", more=""))
    for process in fleet.processes:
        process.spawn()
        assert await process.ended(timeout=TOLD) == 2
        assert "gateway topics create" in process.story()
