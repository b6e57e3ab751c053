"""The rights that docs/operations.md asks a broker with ACLs for: with them alone a gateway does all it has to."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest
from aiohttp import ClientSession
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest
from prometheus_client import CollectorRegistry

from dev.kafka import Broker
from gateway.engine.control.append import append_control_record
from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.jobs.runner import Jobs
from gateway.log.base import Assignment, Commit, Log, Partition, TopicSpec
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.settings import from_sources
from gateway.telemetry.metrics import Metrics
from tests.builders import a_route
from tests.conftest import start_broker
from tests.engine.test_worker import QUIET, rules_of
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, post, signed_post
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 8, group="rights")

ROOT = Path(__file__).parent.parent.parent
OPERATIONS = ROOT / "docs" / "operations.md"
MAKER = "topics"
"""Who calls `gateway topics create`."""
USERS = ("ingress", "router", MAKER, "console")
TABLE = "| Principal | Topic ACLs | Group ACLs |\n|---|---|---|\n"
PASSWORD = "correct horse"
LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule"

# https://kafka.apache.org/protocol#The_Messages_CreateAcls, and the enumerations of org.apache.kafka.common.acl.
RESOURCES = {"topics": 2, "groups": 3}
PREFIXED, ALLOW = 4, 3
CODES = {"Read": 3, "Write": 4, "Create": 5, "Delete": 6, "Describe": 8, "DescribeConfigs": 10}

RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["SECRET"]}, key: body.key, limits: {rate: 100/s}}
  ask: {verify: {scheme: none}, respond: {after_delivery: {destination: first, timeout: 20s}}}
destinations:
  first: {url: "FIRST"}
  second: {url: "SECOND"}
routes:
  - {name: ordered, from: github, to: first, order: key}
  - {name: asked, from: ask, to: first}
  - {name: all, from: github, to: [first, second], retry: {schedule: [1s], max_attempts: 2}}
""".replace("SECRET", SECRET)
NEW = RULES.replace("sources:", "sources:\n  shop: {verify: {scheme: none}}").replace(
    "all, from: github", "all, from: [github, shop]"
)
NOWHERE = "http://127.0.0.1:1/"


class Right(NamedTuple):
    """An operation on everything of a kind whose name begins with a prefix."""

    kind: str
    prefix: str
    operation: str


def documented(prefix: str) -> Mapping[str, list[Right]]:
    """Return the rights by user, as the table in the document has them."""
    rows = OPERATIONS.read_text().partition(TABLE)[2].partition("\n\n")[0].splitlines()
    rights: dict[str, list[Right]] = {}
    for user, row in zip(USERS, rows, strict=True):
        _, who, topics, groups, _ = row.split("|")
        assert {"router": "routing"}.get(user, user) in who
        rights[user] = [*_rights("topics", topics.strip(), prefix), *_rights("groups", groups.strip(), prefix)]
    return rights


def _rights(kind: str, cell: str, prefix: str) -> Iterator[Right]:
    for part in cell.split("; "):
        where, words = "", re.findall(r"`(.+?)`", part)
        if part.startswith("on "):
            where = words.pop(0).removeprefix("gateway.")
        yield from (Right(kind, prefix + where, word) for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """A broker that allows only what is granted; plaintext connections are its administrator's."""

    broker: Broker
    password: Path

    @property
    def address(self) -> str:
        return f"kafka://127.0.0.1:{self.broker.port_of('USERS')}"

    def environ(self, user: str, **settings: str) -> dict[str, str]:
        """Return the variables by which a gateway comes in as a user."""
        return {
            "GATEWAY_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "GATEWAY_KAFKA_SASL_MECHANISM": "PLAIN",
            "GATEWAY_KAFKA_SASL_USERNAME": user,
            "GATEWAY_KAFKA_SASL_PASSWORD_FILE": str(self.password),
            **{f"GATEWAY_{name.upper()}": value for name, value in settings.items()},
        }

    async def allow(self, rights: Mapping[str, Iterable[Right]]) -> None:
        client = AIOKafkaClient(bootstrap_servers=self.broker.address)
        await client.bootstrap()
        try:
            for user, each in rights.items():
                for kind, prefix, operation in each:
                    acl = (RESOURCES[kind], prefix, PREFIXED, f"User:{user}", "*", CODES[operation], ALLOW)
                    answer = await client.send(client.get_random_node(), CreateAclsRequest(*acl))
                    [(code, text)] = answer.creation_responses
                    assert not code, f"{for_code(code)}: {text}"
        finally:
            await client.close()

    async def take_away(self, rights: Mapping[str, Iterable[Right]]) -> None:
        client = AIOKafkaClient(bootstrap_servers=self.broker.address)
        await client.bootstrap()
        try:
            for user, each in rights.items():
                for kind, prefix, operation in each:
                    acl = (RESOURCES[kind], prefix, PREFIXED, f"User:{user}", "*", CODES[operation], ALLOW)
                    answer = await client.send(client.get_random_node(), DeleteAclsRequest(*acl))
                    [(code, text, found)] = answer.filter_responses
                    assert not code, f"{for_code(code)}: {text}"
                    assert found, f"expected a right {user} {kind} {prefix} {operation}, got none"
        finally:
            await client.close()

    @asynccontextmanager
    async def gateway(
        self, folder: Path, role: str, *, rules: str, prefix: str, spool: Path | None = None
    ) -> AsyncIterator[GatewayProcess]:
        home = folder / role
        home.mkdir()
        settings = {"index": str(home / "index.db")} if role == "console" else {}
        settings |= {} if spool is None else {"spool": f"sqlite:///{spool}"}
        environ = self.environ(role, role=role, **settings)
        gateway = GatewayProcess(home, rules=rules, log=self.address, prefix=prefix, environ=environ)
        async with gateway:
            yield gateway


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    users = " ".join([f'user_{user}="{PASSWORD}"' for user in USERS])
    settings = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "listener.name.users.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.users.plain.sasl.jaas.config": f"{LOGIN} required {users};",
    }
    broker = start_broker(settings, listeners={"USERS": "SASL_PLAINTEXT"})
    password = tmp_path_factory.mktemp("guarded") / "password"
    password.write_text(PASSWORD)
    yield Guarded(broker=broker, password=password)
    broker.stop()


@pytest.fixture
def prefix() -> str:
    return f"t{uuid4().hex[:12]}."


@asynccontextmanager
async def opened(guarded: Guarded, user: str) -> AsyncIterator[Log]:
    log = await open_log(from_sources({}, guarded.environ(user, log=guarded.address)), owner=False)
    try:
        yield log
    finally:
        await log.close()


class Nobody:
    """A listener that takes its partitions, and keeps no books."""

    def assigned(self, assignments: object, without_position: object = ()) -> None:
        pass

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: object) -> Mapping[Partition, Commit]:  # noqa: ARG002 - a listener's name for it
        return {}


def to(rules: str, first: str, second: str) -> str:
    return rules.replace("FIRST", first).replace("SECOND", second)


async def make_topics(guarded: Guarded, folder: Path, rules: str, prefix: str) -> int:
    """Call `gateway topics create` as who may do no more, and return its exit code."""
    file = folder / "new.yaml"
    file.write_text(rules)
    environ = guarded.environ(MAKER, rules=str(file), log=guarded.address, topic_prefix=prefix)
    command = (sys.executable, "-m", "gateway", "topics", "create")
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | environ, cwd=ROOT)
    return await process.wait()


async def test_each_half_needs_no_more_than_is_documented(guarded: Guarded, prefix: str, tmp_path: Path) -> None:
    """To start, take events in, deliver them, in order too, give them up, and take a new source in."""
    await guarded.allow(documented(prefix))
    async with Sink() as first, Sink(500, path="/second") as second:
        rules, new = [to(text, first.url, second.url) for text in (RULES, NEW)]
        assert await make_topics(guarded, tmp_path, rules, prefix) == 0
        async with (
            guarded.gateway(tmp_path, "router", rules=rules, prefix=prefix) as router,
            guarded.gateway(tmp_path, "ingress", rules=rules, prefix=prefix) as ingress,
            guarded.gateway(tmp_path, "console", rules=rules, prefix=prefix) as console,
        ):
            assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="1")))[0] == 202
            await first.received(2)
            await router.until("gateway_dead_letters_total", 1, destination="second", reason="exhausted")
            # A new source: refused as long as nobody has made its topic, for neither of them may.
            for half in (router, ingress):
                half.rules.write_text(new)
                refused = await half.line("rules_refused")
                assert "TopicAuthorizationFailed" in "".join(refused["problems"])
            assert await make_topics(guarded, tmp_path, new, prefix) == 0
            for half in (router, ingress):
                await half.line("rules_reloaded")  # by itself
            assert (await post(ingress.port, signed_post(b"{}", delivery="2", path="/in/shop")))[0] == 202
            await first.received(3)
            topic = f"{prefix}events.shop"
            await console.until("gateway_index_lag_records", 0, topic=topic)
            await console.until("gateway_index_events", 2)
            assert (await console.metrics()).sum("gateway_index_interruptions_total") == 0
            kick = f"http://127.0.0.1:{console.admin_port}/api/v1/destinations/second/kick"
            async with ClientSession() as client, client.post(kick, json={}) as given:
                assert given.status == 202, await given.text()
            # The destination's own response, and not the default one.
            assert (await post(ingress.port, signed_post(b"{}", delivery="3", path="/in/ask")))[0] == 200
            assert ingress.lines("rate_not_shared") == []
            for half in (router, ingress):
                assert await half.stop() == 0, half.story()
                assert not [line for line in half.lines("topic_misconfigured") if "DescribeConfigs" in line["problem"]]


@pytest.mark.full
async def test_an_ingress_that_may_not_be_counted_takes_events_in(
    guarded: Guarded, prefix: str, tmp_path: Path
) -> None:
    rights = documented(prefix)
    await guarded.allow({**rights, "ingress": [right for right in rights["ingress"] if right.kind == "topics"]})
    rules = to(RULES, NOWHERE, NOWHERE)
    assert await make_topics(guarded, tmp_path, rules, prefix) == 0
    async with guarded.gateway(tmp_path, "ingress", rules=rules, prefix=prefix) as ingress:
        assert "authoriz" in (await ingress.line("rate_not_shared"))["error"].lower()
        assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="1")))[0] == 202


async def test_a_spool_is_moved_with_the_documented_rights_and_not_without_that_to_read(
    guarded: Guarded, prefix: str, tmp_path: Path
) -> None:
    """What was tried without an answer is looked for, so that nothing comes twice."""
    await guarded.allow(documented(prefix))
    write, read = [{"ingress": [Right("topics", f"{prefix}events.", each)]} for each in ("Write", "Read")]
    rules = to(RULES, NOWHERE, NOWHERE)
    assert await make_topics(guarded, tmp_path, rules, prefix) == 0
    spool = tmp_path / "spool.db"
    async with guarded.gateway(tmp_path, "ingress", rules=rules, prefix=prefix, spool=spool) as ingress:
        assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="1")))[0] == 202
        for right in (write, read):
            await guarded.take_away(right)
        await asyncio.sleep(1)
        assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="2")))[0] == 202
        assert "authoriz" in (await ingress.line("spool_began"))["error"].lower()
        await guarded.allow(write)
        await ingress.line("spool_waits", timeout=30)
        await asyncio.sleep(3)
        await ingress.until("gateway_spool_events", 1)
        await guarded.allow(read)
        await ingress.until("gateway_spool_events", 0, timeout=30)
        await ingress.until("gateway_spool_moved_events_total", 1)
        assert await ingress.stop() == 0, ingress.story()


def custom(topic: str, prefix: str) -> Mapping[str, list[Right]]:
    """Return the rights to a topic that a source names itself, as the document has them in words."""
    both = [Right("topics", topic, name) for name in ("Read", "Write", "DescribeConfigs")]
    return {
        "ingress": [*both, Right("groups", f"{prefix}sources", "Read")],
        "router": both,
        MAKER: [Right("topics", topic, name) for name in ("Describe", "Create")],
    }


@pytest.mark.timeout(120)
@pytest.mark.full
@pytest.mark.parametrize("taken", ["Read", "Write", "all"])
async def test_revoked_topic_rights_end_no_process_and_delay_no_other_source(
    guarded: Guarded, prefix: str, tmp_path: Path, taken: str
) -> None:
    """Nor what has an order. What its senders were promised meanwhile is delivered once the rights are back."""
    topic = f"shop-{uuid4().hex[:12]}"
    rights = custom(topic, prefix)
    lost = {
        user: [each for each in rights[user] if each.kind == "topics" and taken in (each.operation, "all")]
        for user in ("ingress", "router")
    }
    await guarded.allow(documented(prefix))
    await guarded.allow(rights)
    async with Sink() as first, Sink(path="/second") as second:
        new = NEW.replace("{verify: {scheme: none}}", f"{{verify: {{scheme: none}}, topic: {topic}}}")
        rules = to(new, first.url, second.url)
        assert await make_topics(guarded, tmp_path, rules, prefix) == 0
        async with (
            guarded.gateway(tmp_path, "router", rules=rules, prefix=prefix) as router,
            guarded.gateway(tmp_path, "ingress", rules=rules, prefix=prefix) as ingress,
        ):

            async def shop(number: int) -> int:
                return (await post(ingress.port, signed_post(b"{}", delivery=f"s{number}", path="/in/shop")))[0]

            assert await shop(0) == 202
            await second.received(1)
            await guarded.take_away(lost)
            await asyncio.sleep(1)
            accepted = 1
            for number in range(1, 15):  # whatever is looked at every ten seconds comes round
                accepted += await shop(number) == 202
                sent = signed_post(b'{"key":"a"}', delivery=f"g{number}")
                assert (await post(ingress.port, sent))[0] == 202
                await first.received(1 + 2 * number, timeout=5)
                await asyncio.sleep(1)
            unread = router if taken == "Read" else ingress
            assert (await unread.metrics()).sum(
                "gateway_log_partition_unavailable_seconds", topic=topic
            ) > 0 or taken == "Write"
            assert accepted == (15 if taken == "Read" else 1)
            for half in (router, ingress):
                assert half.is_running, half.story()
                assert (await half.metrics()).sum("gateway_log_up") == 1
                [line] = half.lines("partitions_unavailable")[:1] or [{"topic": topic}]
                assert line["topic"] == topic
            await guarded.allow(lost)
            until = asyncio.get_running_loop().time() + 15
            while await shop(99) != 202:
                assert asyncio.get_running_loop().time() < until
                await asyncio.sleep(0.2)
            await second.received(14 + accepted + 1, timeout=20)
            for half in (router, ingress):
                await half.until("gateway_log_partition_unavailable_seconds", 0, timeout=30)
                assert await half.stop() == 0, half.story()


@pytest.mark.full
@pytest.mark.timeout(90)
async def test_revoked_group_rights_end_no_process_and_restored_ones_suffice(
    guarded: Guarded, prefix: str, tmp_path: Path
) -> None:
    await guarded.allow(documented(prefix))
    groups = {"router": [Right("groups", prefix, "Read")]}
    async with Sink() as first, Sink(path="/second") as second:
        rules = to(RULES, first.url, second.url)
        assert await make_topics(guarded, tmp_path, rules, prefix) == 0
        async with (
            guarded.gateway(tmp_path, "router", rules=rules, prefix=prefix) as router,
            guarded.gateway(tmp_path, "ingress", rules=rules, prefix=prefix) as ingress,
        ):
            assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="1")))[0] == 202
            await first.received(2)
            await guarded.take_away(groups)
            await router.line("partitions_unavailable", timeout=25)
            assert len(router.lines("log_fetch_failed")) < 30
            await guarded.allow(groups)
            assert (await post(ingress.port, signed_post(b'{"key":"a"}', delivery="2")))[0] == 202
            await first.received(4, timeout=30)
            assert await router.stop() == 0, router.story()


async def test_jobs_continue_without_the_rights_to_a_topic_named_in_records(guarded: Guarded, prefix: str) -> None:
    """The history of a removed source with a `topic` of its own, and a replay of it, or of what can be no topic."""
    await guarded.allow(documented(prefix))
    topics = Topics(prefix)
    async with opened(guarded, MAKER) as log:
        await log.create(topics.specs([topics.events("github")], set()))
    async with opened(guarded, "router") as log:
        history = ControlRecord(
            kind="routed", name="1-abc", state="done", at=log.now(), checkpoint={"orders/0": 7}, revision="r"
        )
        replays = [
            ControlRecord(
                kind="replay",
                name=name,
                state="requested",
                at=log.now(),
                checkpoint={place: 5},
                selection=Selection(route="build", since=0.0, starts={place: 0}),
            )
            for name, place in (("forbidden", "orders/0"), ("impossible", "./0"), ("ours", f"{prefix}events.github/0"))
        ]
        for record in (history, *replays):
            await append_control_record(log, topics, record)
        follower = Follower(log, topics, Metrics(CollectorRegistry()), QUIET)
        rules = await asyncio.to_thread(rules_of, a_route())
        jobs = Jobs(
            log=log,
            topics=topics,
            rules=lambda: rules,
            follower=follower,
            metrics=Metrics(CollectorRegistry()),
            logger=QUIET,
        )
        caught_up = asyncio.Event()
        running = [asyncio.create_task(follower.follow(caught_up)), asyncio.create_task(jobs.run())]
        try:
            control, until = follower.control, asyncio.get_running_loop().time() + 20
            while control.commands.get("replay/ours", replays[-1]).state != "done" or control.history.partitions():
                assert asyncio.get_running_loop().time() < until
                await asyncio.sleep(0.1)
            assert control.commands["replay/forbidden"].state == "requested"
            assert "replay/impossible" not in control.commands
            assert not any(task.done() for task in running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def test_a_router_has_the_group_rights_for_an_hours_work(guarded: Guarded, prefix: str) -> None:
    await guarded.allow(documented(prefix))
    topic, group = f"{prefix}events.github", f"{prefix}ordered/a/b"
    async with opened(guarded, MAKER) as log:
        await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
    async with opened(guarded, "router") as log:
        await log.seed(group, {Partition(topic, 0): Commit(0, b"")})
        consumer = await log.consume(group=group, topics=[topic], listener=Nobody())
        await consumer.close()
        assert await log.groups(prefix) == {group: 0}
        assert await log.topics_of(group) == {topic}


async def test_an_ingress_has_to_see_every_topic(guarded: Guarded, prefix: str, tmp_path: Path) -> None:
    rights = documented(prefix)
    events = Right("topics", f"{prefix}events.", "Write")
    assert events in rights["ingress"]
    await guarded.allow({**rights, "ingress": [events]})
    rules = to(RULES, NOWHERE, NOWHERE)
    assert await make_topics(guarded, tmp_path, rules, prefix) == 0
    (tmp_path / "ingress").mkdir()
    environ = guarded.environ("ingress", role="ingress")
    ingress = GatewayProcess(tmp_path / "ingress", rules=rules, log=guarded.address, prefix=prefix, environ=environ)
    ingress.spawn()
    assert await ingress.ended(timeout=10) == 2
    assert "TopicAuthorizationFailed" in ingress.story()
