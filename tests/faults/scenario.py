"""Gateways under load, between a log and two destinations, with a ledger of events and requests.

    async with Scenario("killed", place, folder, table) as scenario:
        async with scenario.load():
            scenario.kill(scenario.gateways[0])
            await scenario.gateways[0].start()
        await scenario.settle()             # fails if something was lost, or duplicated without a reason

Both destinations get every event. The first takes what comes. The second also refuses some for good (a dead letter),
and others once or twice (one retry is waited for in memory, the next one in a tier): every path of the engine is under
way when a fault comes. Each gateway marks its requests with a header, by which a duplicate is held against its own
crash.
"""

import asyncio
import itertools
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from http import HTTPStatus
from pathlib import Path
from statistics import median
from typing import Self

import orjson
from aiokafka import AIOKafkaConsumer

from dev.kafka import Broker, Cluster
from gateway.engine.committer import COMMIT_AFTER, COMMIT_GAP
from gateway.log.topics import TIERS
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.faults.accounts import COMMIT_WINDOW, Account, Arrival, Incident, number_of, settle
from tests.gateway_process import COMMAND, ROOT, GatewayProcess
from tests.load import NO_ANSWER, Load
from tests.sink import Request, Sink

RULES = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}", timeout: 2s, headers: {{X-Gateway: {name}}}}}
  second: {{url: "{second}", timeout: 2s, headers: {{X-Gateway: {name}}}}}
routes:
  - name: all
    from: github
    to: [first, second]
    retry: {{schedule: [100ms, 5s], max_attempts: 100, jitter: 0}}
"""
)
Table = Callable[[str, Account], None]
"""Takes an account with its title."""
CONCURRENCY = 50
"""Maximum number of requests in flight to a destination, by default."""
JOINING = 5.0
"""Seconds in which others may have taken over a gateway's partitions before it is woken."""
ANSWERED = 0.2
"""Seconds within which a request gets its response, unless the connection is cut."""
GONE, TOO_EARLY = 410, 425
"""Statuses that don't count as failures: the breaker stays closed."""
JOINED = 4.0
"""Seconds until a group has admitted a new member, after the heartbeats of all others."""
QUIET = 1.5
"""Seconds without a request after which nothing more is expected: what a gateway still has in hand goes out at once."""
QUIET_TIMEOUT = 30.0
COMMAND_TIMEOUT = 30.0


class Scenario:
    """The setup of one fault. A context manager, in which `count` gateways listen on one port."""

    def __init__(
        self,
        title: str,
        place: LogPlace,
        folder: Path,
        table: Table,
        *,
        count: int = 1,
        rate: float = 150.0,
        connections: int = 64,
        through: Sequence[str] = (),
        rules: str = RULES,
        urls: Callable[[Sink, Sink], tuple[str, str]] = lambda first, second: (first.url, second.url),
        is_dev: bool = True,
    ) -> None:
        """`urls` are those of the two sinks; the `rules` must deliver to both.

        Without `is_dev` the gateways run as in production: a command creates the topics, and not the first gateway.
        """
        self.title = f"{title}, {place.kind}"
        self.place = place
        self.gateways: list[GatewayProcess] = []
        self.first = Sink(path="/first")
        self.second = Sink(answer_of_second, path="/second")
        self.sender: Load
        self._count = count
        self._rate = rate
        self._connections = connections
        self._folder = folder
        self._table = table
        self._through = through
        self._rules = rules
        self._urls = urls
        self._is_dev = is_dev
        self._incidents: list[Incident] = []
        self._kills: list[float] = []
        self._names: dict[GatewayProcess, str] = {}
        self._stack = AsyncExitStack()
        self._number = itertools.count(1)

    async def __aenter__(self) -> Self:
        try:
            for sink in (self.first, self.second):
                await self._stack.enter_async_context(sink)
            for _ in range(self._count):
                gateway = self.add()
                if len(self.gateways) == 1 and not self._is_dev:
                    await self.run_command("topics", "create")
                await gateway.start()  # with `--dev`, the first of them creates the topics
            if self._count > 1:
                await asyncio.sleep(JOINED)
        except BaseException:
            await self._stack.aclose()
            raise
        self.sender = Load(self.gateways[0].port, rate=self._rate, connections=self._connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def add(self) -> GatewayProcess:
        """Return one more gateway, not started yet."""
        name = f"g{next(self._number)}"
        folder = self._folder / name
        folder.mkdir()
        gateway = GatewayProcess(
            folder,
            rules=self.rules(name),
            log=self.place.url,
            prefix=self.place.prefix,
            beside=self.gateways[0] if self.gateways else None,
            through=self._through,
            is_dev=self._is_dev,
        )
        self.gateways.append(gateway)
        self._names[gateway] = name
        self._stack.callback(_end, gateway)
        return gateway

    async def run_command(self, *arguments: str) -> None:
        """Run an operator's command with the rules of the first gateway."""
        await command(self.place, *arguments, f"--rules={self.gateways[0].rules}")

    def rules(self, name: str) -> str:
        """Return the rules of the gateway of this name."""
        first, second = self._urls(self.first, self.second)
        return self._rules.format(first=first, second=second, name=name)

    @asynccontextmanager
    async def load(self) -> AsyncIterator[None]:
        """Send while the block runs, which begins when each gateway has work; end when each request has its answer."""
        stopped = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.sender.send_until(stopped), name="load")
            try:
                await self.until_all_work()
                yield
            finally:
                stopped.set()

    async def until_all_work(self, *, timeout: float = 30.0) -> None:
        """Wait until each gateway that runs has made attempts."""
        until = time.monotonic() + timeout
        idle = [gateway for gateway in self.gateways if gateway.is_running]
        while idle:
            assert time.monotonic() < until, f"expected every gateway to have work in time\n{idle[0].story()}"
            idle = [each for each in idle if not (await each.metrics()).sum("gateway_attempts_total")]
            await asyncio.sleep(0.1)

    async def acknowledged(self, count: int, *, timeout: float = 30.0) -> None:
        """Wait until so many more events are acknowledged."""
        wanted, until = self.sender.acknowledged_count + count, time.monotonic() + timeout
        while self.sender.acknowledged_count < wanted:
            assert time.monotonic() < until, f"expected {count} more 202s in {timeout:g} s\n{self.story()}"
            await asyncio.sleep(0.005)

    # What happens to a gateway, and which duplicates that explains.

    def kill(self, gateway: GatewayProcess) -> None:
        """Kill it, like a crash."""
        at = time.time()
        gateway.kill()  # takes a while with a write under way, in which no sink notes what comes
        self._kills.append(at)
        self._incidents.append(Incident.crash(at, self._names[gateway], ended=time.time()))

    async def freeze(self, gateway: GatewayProcess, seconds: float, *, explains: float) -> None:
        """Stop all of its threads for `seconds`.

        Others may do again what it hadn't committed, and what it does in its first `explains` seconds afterwards, if it
        was evicted from its group and has not heard of it. Then it may also defer what has waited in its lanes, while
        others deliver it: that comes again from a tier.
        """
        before = await gateway.metrics()
        at = time.time()
        gateway.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            gateway.signal(signal.SIGCONT)
        if explains:
            name, woken = self._names[gateway], time.time()
            zombie = Incident(since=woken, until=woken + explains, gateway=name, is_zombie=True)
            self._incidents += [Incident.crash(at, name), zombie]
            await asyncio.sleep(explains)
            after = await gateway.metrics()
            for destination in ("first", "second"):
                deferred = [each.sum("gateway_spills_total", destination=destination) for each in (before, after)]
                self._incidents.append(
                    Incident(
                        since=woken - JOINING,
                        until=woken + explains,
                        destination=destination,
                        at_most=deferred[1] - deferred[0],
                    )
                )

    async def restart(self, gateway: GatewayProcess) -> None:
        """Stop it gracefully and start it again: no reason for a duplicate."""
        assert await gateway.stop() == 0, gateway.story()
        assert not gateway.lines("drain_cut_short"), gateway.story()
        await gateway.start()

    def explain(self, since: float, until: float, *, uncommitted: float) -> None:
        """Allow duplicates of requests from any gateway in this time, a bounded number at each destination.

        That is what comes in a commit window and in `uncommitted` seconds, for which there was something to finish and
        nothing could be committed.
        """
        at_most = self._rate * (COMMIT_WINDOW + uncommitted)
        self._incidents.append(Incident(since=since - COMMIT_WINDOW, until=until, at_most=at_most))

    @asynccontextmanager
    async def without_commits(self, node: Broker, cluster: Cluster) -> AsyncIterator[None]:
        """Allow duplicates of what can't be committed while a node is away and coordinates the group."""
        began = time.time()
        group = f"{self.place.prefix}router"

        async def until_another() -> float:
            while await cluster.coordinator(group) is node:  # noqa: ASYNC110 - what brokers agree on sets no event
                await asyncio.sleep(0.1)
            return time.time()

        if await cluster.coordinator(group) is not node:
            yield
            self.explain(began, time.time(), uncommitted=0)
            return
        async with asyncio.TaskGroup() as tasks:
            taken_over = tasks.create_task(until_another(), name="coordinator")
            yield
        self.explain(began, time.time(), uncommitted=taken_over.result() - began)

    def explain_in_flight(self, since: float, until: float, *, destination: str) -> None:
        """Allow duplicates of what was in flight to a destination whose connections were cut in this time."""
        cut = Incident(since=since - ANSWERED, until=until, destination=destination, at_most=CONCURRENCY)
        self._incidents.append(cut)

    def uncommitted(self, under_way: float) -> int:
        """Return how many requests the kills may have repeated, where a commit under way takes so many seconds.

        At each destination `COMMIT_AFTER`, or what came in the gap between two commits, and what came during one. By
        what came, and not by the rate: after a kill the sender catches up at twice its rate.
        """
        return sum(
            max(COMMIT_AFTER, _came(sink, at, COMMIT_GAP)) + _came(sink, at, under_way)
            for at in self._kills
            for sink in (self.first, self.second)
        )

    @property
    def usual_wait(self) -> float:
        """How many seconds an acknowledgement has taken: of half of them no more."""
        return median(
            [sent.answered_at - sent.at for sent in self.sender.answers if sent.status == HTTPStatus.ACCEPTED]
        )

    # The end.

    async def settle(self, *, timeout: float = 60.0) -> Account:
        """Wait until every acknowledged event has arrived, and nothing more arrives; then close the ledger.

        Fails if anything was lost or altered, or duplicated without a reason.
        """
        await self.until_all_came(timeout)
        await self._until_quiet()
        statuses = self.sender.statuses()
        numbers = self.sender.numbers
        account = settle(
            acknowledged=self.sender.acknowledged,
            refused=statuses.total() - statuses[202],
            bodies={event: self.sender.body(number) for event, number in numbers.items()},
            arrivals=self.arrivals(),
            destinations=("first", "second"),
            dead=await dead_letters(self.place),
            stored=await stored(self.place),
            incidents=self._incidents,
            deferred=await deferred(self.place),
        )
        self._table(self.title, account)
        assert statuses.keys() <= {202, 503, NO_ANSWER}, f"{statuses}\n{self.story()}"
        assert (account.lost, account.altered, account.unexplained) == (0, 0, 0), f"{account}\n{self.story()}"
        assert account.dead == sum(map(_is_gone, numbers.values())), (
            "expected only what was refused for good to be dead"
        )
        assert account.duplicated <= account.allowed + account.stored_again, account
        assert account.acknowledged
        return account

    def arrivals(self) -> list[Arrival]:
        return [Arrival.of(request, "first", 200) for request in self.first.requests] + [
            Arrival.of(request, "second", answer_of_second(request)) for request in self.second.requests
        ]

    def story(self) -> str:
        """Return the gateways' logs, for the message of a failure."""
        return "\n".join([f"-- {self._names[each]}\n{each.story()}" for each in self.gateways])

    async def until_all_came(self, timeout: float) -> None:
        """Wait until every acknowledged event has been delivered, or for so long."""
        until = time.monotonic() + timeout
        numbers = self.sender.numbers.values()
        missing = [set(numbers), {number for number in numbers if not _is_gone(number)}]
        seen = [0, 0]
        while any(missing) and time.monotonic() < until:
            for index, sink in enumerate((self.first, self.second)):
                fresh = sink.requests[seen[index] :]
                seen[index] += len(fresh)
                missing[index] -= {
                    number_of(request.body)
                    for request in fresh
                    if sink is self.first or answer_of_second(request) == 200
                }
            await asyncio.sleep(0.05)

    async def _until_quiet(self) -> None:
        until = time.monotonic() + QUIET_TIMEOUT
        count, since = -1, 0.0
        while time.monotonic() < until:
            now = len(self.first.requests) + len(self.second.requests)
            if now != count:
                count, since = now, time.monotonic()
            elif time.monotonic() > since + QUIET:
                return
            await asyncio.sleep(0.05)


def answer_of_second(request: Request) -> int:
    """Refuse every fiftieth event for good, every tenth once, and half of those once more."""
    number = number_of(request.body)
    if _is_gone(number):
        return GONE
    refused = 0 if number % 10 != 3 else 1 if number % 20 == 3 else 2
    return TOO_EARLY if int(request.header("gateway-attempt") or 0) <= refused else 200


def _is_gone(number: int) -> bool:
    return number % 50 == 7


def _came(sink: Sink, at: float, seconds: float) -> int:
    """Count the requests of the last seconds before a time."""
    return sum(at - seconds < request.at <= at for request in sink.requests)


def account_of(loads: Sequence[Load], sinks: Mapping[str, Sink]) -> Account:
    """Return the account of a fault that explains no duplicate, at destinations that accept everything."""
    statuses = sum([load.statuses() for load in loads], Counter[int]())
    return settle(
        acknowledged={event: at for load in loads for event, at in load.acknowledged.items()},
        refused=statuses.total() - statuses[202],
        bodies={event: load.body(number) for load in loads for event, number in load.numbers.items()},
        arrivals=[Arrival.of(request, name, 200) for name, sink in sinks.items() for request in sink.requests],
        destinations=sinks.keys(),
        dead=(),
        stored={},
        incidents=(),
    )


async def command(place: LogPlace, *arguments: str) -> bytes:
    """Run an operator's command next to the gateways, and return its output."""
    where = (f"--log={place.url}", f"--topic-prefix={place.prefix}")
    program, *rest = COMMAND
    process = await asyncio.create_subprocess_exec(
        program,
        *rest[:-1],
        *arguments,
        *where,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, errors.decode()
    return output


async def dead_letters(place: LogPlace) -> set[tuple[str, str]]:
    """Return the (event, destination) of each dead letter."""
    lines = (await command(place, "dead", "list", "--all", "--limit=1000000", "--json")).splitlines()
    return {(letter["event_id"], letter["destination"]) for letter in map(orjson.loads, lines)}


async def stored(place: LogPlace) -> Counter[str]:
    """Count the records of each event in the log."""
    records = await _records(place, [f"{place.prefix}events.github"])
    return Counter(headers["ce_id"] for _, headers in records)


async def deferred(place: LogPlace) -> dict[tuple[str, str], list[float]]:
    """Return when deliveries were stored in retry topics without an attempt, by event and destination."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for at, headers in await _records(place, [f"{place.prefix}retry.{tier}" for tier in TIERS]):
        delivery = orjson.loads(headers["gw_delivery"])
        if not delivery["attempts"]:
            found[headers["ce_id"], delivery["destination"]].append(at)
    return found


async def _records(place: LogPlace, topics: Sequence[str]) -> list[tuple[float, dict[str, str]]]:
    """Return when each record of these topics was appended, and its headers, with another client than the gateway's."""
    if not place.is_kafka:
        with closing(sqlite3.connect(place.path)) as connection:
            rows = connection.execute(
                "SELECT at, headers FROM records JOIN topics ON topics.id = records.id >> 48 "
                f"WHERE name IN ({','.join('?' * len(topics))})",
                topics,
            ).fetchall()
        return [(at / 1e6, dict(orjson.loads(headers))) for at, headers in rows]
    found: list[tuple[float, dict[str, str]]] = []
    consumer = AIOKafkaConsumer(*topics, bootstrap_servers=place.servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        begins = await consumer.beginning_offsets(consumer.assignment())
        ends = await consumer.end_offsets(consumer.assignment())
        async with asyncio.timeout(COMMAND_TIMEOUT):
            while len(found) < sum(ends.values()) - sum(begins.values()):
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    found += [
                        (
                            record.timestamp / 1e3,
                            {name: value.decode(errors="replace") for name, value in record.headers},
                        )
                        for record in records
                    ]
    finally:
        await consumer.stop()
    return found


def _end(gateway: GatewayProcess) -> None:
    if gateway.is_running:
        gateway.kill()
