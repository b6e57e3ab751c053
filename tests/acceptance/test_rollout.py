"""A new version takes the place of the old one under load, process by process, as an orchestrator has it.

ingress   the new one is ready ─▶ the balancer takes it in, and the old one out ─▶ SIGTERM to the old one ─▶ drained
router    the new one is ready ─▶ SIGTERM to the old one, while the group still shares its partitions out ─▶ drained

Both at the same time, as two deployments are.

The old version is the one before this tree (`tests/gateway_versions.py`): two versions are in one group and on one log.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.gateway_versions import THIS, PreviousMissingError, Version, changed, previous
from tests.load import NO_ANSWER, Ledger, Load, all_delivered, report
from tests.sink import Answer, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RATE = 500.0
"""Events a second, two deliveries each."""
SLOW = Answer(delay=0.1)
"""So that there is always much under way: all of the 50 that a destination may have, at this rate."""
SLOWEST = 10.0
"""Seconds after its acknowledgement that a delivery may take to a destination that isn't busy all the time."""
QUIET = 6.0
"""Seconds after the last event in which a second copy of one would come: the shortest tier, and a moment."""
NUMBERS = 1_000_000
"""Events of one load at most: each numbers its own."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Return the version before this one, or skip where there is none; with CI=true that is a failure."""
    try:
        return previous(tmp_path_factory.mktemp("previous"))
    except PreviousMissingError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


class Balancer:
    """Sends to several ingresses, as a load balancer passes requests on: to none that was taken out."""

    def __init__(self, tasks: asyncio.TaskGroup, *, rate: float) -> None:
        self.loads: list[Load] = []
        self._tasks = tasks
        self._rate = rate
        self._sending: dict[int, tuple[asyncio.Event, asyncio.Task[None]]] = {}

    @property
    def acknowledged(self) -> dict[str, float]:
        return {event: at for load in self.loads for event, at in load.acknowledged.items()}

    @property
    def statuses(self) -> Counter[int]:
        return sum([load.statuses() for load in self.loads], Counter[int]())

    def take_in(self, port: int) -> None:
        """Have an ingress get its part of the requests from now on."""
        load = Load(port, rate=self._rate, connections=16, first=len(self.loads) * NUMBERS)
        stopped = asyncio.Event()
        self.loads.append(load)
        self._sending[port] = stopped, self._tasks.create_task(load.send_until(stopped))

    async def take_out(self, port: int) -> None:
        """Send nothing more to an ingress; return when each request to it has its answer."""
        stopped, sending = self._sending.pop(port)
        stopped.set()
        await sending

    async def close(self) -> None:
        for port in list(self._sending):
            await self.take_out(port)


class Fleet:
    """Gateways of one log, each in a folder of its own."""

    def __init__(self, stack: AsyncExitStack, folder: Path, place: LogPlace, rules: str) -> None:
        self._stack = stack
        self._folder = folder
        self._place = place
        self._rules = rules
        self._count = 0

    async def start(self, version: Version, *roles: str, beside: GatewayProcess | None = None) -> list[GatewayProcess]:
        """Start one more of each role, and return them once they are ready."""
        return await asyncio.gather(*[self._start(version, role, beside) for role in roles])

    async def _start(self, version: Version, role: str, beside: GatewayProcess | None) -> GatewayProcess:
        folder = self._folder / f"{self._place.prefix}{self._count}"
        folder.mkdir()
        self._count += 1
        gateway = GatewayProcess(
            folder,
            rules=self._rules,
            log=self._place.url,
            prefix=self._place.prefix,
            environ={"GATEWAY_ROLE": role},
            beside=beside,
            command=version.command,
            home=version.home,
        )
        await self._stack.enter_async_context(gateway)
        await gateway.ready()
        return gateway


async def ended(gateway: GatewayProcess) -> None:
    """Stop a gateway, and see that it drained."""
    assert await gateway.stop() == 0, gateway.story()
    assert not gateway.lines("drain_cut_short"), gateway.story()


def slowest(sink: Sink, acknowledged: Mapping[str, float]) -> float:
    """Return the longest that an event waited for its delivery, in seconds after its acknowledgement."""
    return max(request.at - acknowledged[request.header("gateway-event-id") or ""] for request in sink.requests)


def test_the_previous_version_runs_code_of_its_own(before: Version) -> None:
    assert before.code() not in {THIS.code(), ROOT / "gateway"}


@pytest.mark.timeout(300)
async def test_a_rolling_upgrade_refuses_loses_and_repeats_nothing(
    kafka_place: LogPlace, folder: Path, before: Version, *, is_full: bool
) -> None:
    upgrades = [(before, THIS), (THIS, before), (THIS, THIS)] if is_full else [(before, THIS)]
    for number, (old, new) in enumerate(upgrades):
        place = kafka_place.another(f"upgrade-{number}")
        async with Sink(SLOW, path="/first") as first, Sink(path="/second") as second, AsyncExitStack() as stack:
            fleet = Fleet(stack, folder, place, RULES.format(first=first.url, second=second.url))
            await _upgrade(fleet, old, new, first, second, each=2 if is_full else 1, quiet=QUIET if is_full else 0.0)


async def _upgrade(
    fleet: Fleet, old: Version, new: Version, first: Sink, second: Sink, *, each: int, quiet: float
) -> None:
    """Replace so many ingresses and routers, one after the other, and hold the books against each other."""
    before = [await fleet.start(old, "router", "ingress") for _ in range(each)]
    after: list[GatewayProcess] = []
    async with asyncio.TaskGroup() as tasks:
        balancer = Balancer(tasks, rate=RATE / each)
        for _, ingress in before:
            balancer.take_in(ingress.port)
        await first.received(int(RATE), timeout=30)
        for router, ingress in before:
            more = await fleet.start(new, "router", "ingress")
            after += more
            balancer.take_in(more[1].port)
            await asyncio.gather(ended(router), balancer.take_out(ingress.port))  # the pause before the signal
            await ended(ingress)
        so_far = len(first.requests)
        await first.received(so_far + int(RATE), timeout=30)
        await balancer.close()
    acknowledged = balancer.acknowledged
    await all_delivered(acknowledged, first, second, timeout=30)
    await asyncio.sleep(quiet)
    ledgers = [Ledger.of(sink, acknowledged) for sink in (first, second)]
    busy, idle = [slowest(sink, acknowledged) for sink in (first, second)]
    report(
        f"{each} + {each} processes from {old.name} to {new.name} under {RATE:g}/s, "
        f"slowest delivery {busy:.1f} s to the destination that is busy, {idle:.1f} s to the other",
        dict(balancer.statuses),
        *ledgers,
    )
    stories = "\n".join([gateway.story() for gateway in after])
    assert balancer.statuses.keys() == {202}, "nothing is refused"
    assert [(ledger.lost, ledger.duplicated) for ledger in ledgers] == [(0, 0)] * 2, stories
    assert idle < SLOWEST, stories


async def test_a_restart_on_a_shared_port_refuses_only_open_requests(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """Without a balancer: the kernel shares the connections out, and some are the old process's until its end."""
    rounds = 5 if is_full else 1
    async with Sink(SLOW, path="/first") as first, Sink(path="/second") as second, AsyncExitStack() as stack:
        fleet = Fleet(stack, folder, kafka_place, RULES.format(first=first.url, second=second.url))
        router, old = await fleet.start(THIS, "router", "ingress")
        load = Load(old.port, rate=RATE)
        stopped = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.send_until(stopped))
            for _ in range(rounds):
                so_far = load.acknowledged_count
                await first.received(so_far + int(RATE), timeout=30)
                [new] = await fleet.start(THIS, "ingress", beside=old)
                await ended(old)
                old = new
            so_far = load.acknowledged_count
            await first.received(so_far + int(RATE), timeout=30)
            stopped.set()
        await all_delivered(load.acknowledged, first, second, timeout=30)
        ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
        refused = [sent for sent in load.answers if sent.status != 202]
        report(f"{rounds} restarts on a shared port under {RATE:g}/s", dict(load.statuses()), *ledgers)
        assert [(ledger.lost, ledger.duplicated) for ledger in ledgers] == [(0, 0)] * 2, router.story()
        assert all(sent.status == NO_ANSWER or b"\r\nRetry-After: " in sent.head for sent in refused)
        assert len(refused) <= 32 * rounds, "at most one for each connection"


async def test_records_of_a_newer_format_wait_for_the_newer_version(kafka_place: LogPlace, folder: Path) -> None:
    """The wrong order, or a rollback: ingresses write what the routers can't read yet, or no more."""
    newer = changed(folder / "newer", "gateway/log/records.py", "FORMAT = 1\n", "FORMAT = 2\n")
    assert newer.code() == folder / "newer" / "gateway"
    async with Sink(path="/first") as first, Sink(path="/second") as second, AsyncExitStack() as stack:
        fleet = Fleet(stack, folder, kafka_place, RULES.format(first=first.url, second=second.url))
        router, ingress = await fleet.start(THIS, "router", "ingress")
        load = Load(ingress.port, rate=RATE)
        await load.send(100)
        [ingress] = await fleet.start(newer, "ingress")
        unread = Load(ingress.port, rate=RATE, first=NUMBERS)
        await unread.send(100)
        await router.until("gateway_records_newer", 100, kind="events")
        await load.send(100)
        await all_delivered(load.acknowledged, first, second, timeout=10)
        assert len(first.requests) == 200
        await ended(router)
        [router] = await fleet.start(THIS, "router")  # which reads no further
        await router.until("gateway_records_newer", 100, kind="events")
        await ended(router)

        [router] = await fleet.start(newer, "router")
        await all_delivered([*load.acknowledged, *unread.acknowledged], first, second, timeout=15)
        assert (await router.metrics()).sum("gateway_dead_letters_total") == 0
        ledgers = [Ledger.of(sink, [*load.acknowledged, *unread.acknowledged]) for sink in (first, second)]
        report("200 events of this format and 100 of the next", *ledgers)
        assert [(ledger.lost, ledger.duplicated) for ledger in ledgers] == [(0, 0)] * 2
        bodies = {request.body for request in first.requests}
        assert {unread.body(number) for number in unread.numbers.values()} <= bodies
