"""Contestants that take turns, with one sender each and a common destination, in the loop that sends and receives."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from benchmarks.processes import Measured
from benchmarks.traffic import Destination, Sender
from gateway.log.base import TopicSpec
from gateway.log.kafka.log import KafkaLog

MEBI = 1 << 20
CONNECTIONS = 64
WARM_UP = 1_000
SETTLE = 0.2  # Seconds between bursts, for the commit and the log lines of the last one.
SAMPLED = 0.25  # Seconds between looks at memory.
DRIP = 0.05  # Seconds between events when the gateway is otherwise idle.


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a run: numbers of events, but for `rounds`, `routes`, and `idle` connections.

    `memory` are the numbers of events after which memory is measured; `large`, `many`, `idle` and `backlog` are of the
    scenarios.
    """

    rounds: int
    events: int
    drips: int
    routes: tuple[int, ...]
    memory: tuple[int, ...]
    large: int
    many: int
    idle: int
    backlog: int


FULL = Plan(
    rounds=7,
    events=8_000,
    drips=300,
    routes=(10, 10_000, 100_000),
    memory=(50_000, 100_000, 150_000),
    large=4_000,
    many=20,
    idle=50_000,
    backlog=2_000_000,
)
QUICK = Plan(
    rounds=3,
    events=2_000,
    drips=60,
    routes=(10, 10_000),
    memory=(10_000, 20_000),
    large=500,
    many=5,
    idle=5_000,
    backlog=50_000,
)


class Bursts(NamedTuple):
    """The results of each round: CPU time (µs per event), events per second acknowledged and delivered."""

    cpu: tuple[float, ...]
    accepted: tuple[float, ...]
    delivered: tuple[float, ...]


class Contestant(NamedTuple):
    """A process with its sender; each event reaches the destination `fan_out` times.

    Its bursts are `share` times as large.
    """

    process: Measured
    sender: Sender
    fan_out: int
    share: int = 1


class Contest:
    """What is measured alike of each contestant."""

    def __init__(self, plan: Plan, folder: Path, servers: str, progress: Progress) -> None:
        self.plan = plan
        self.folder = folder
        self.servers = servers
        self.progress = progress
        self.destination: Destination
        self.port = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Have a destination meanwhile."""
        self.destination = Destination()
        self.port = await self.destination.start()
        try:
            yield
        finally:
            self.destination.close()

    async def create(self, topic: str) -> None:
        log = await KafkaLog.open(self.servers)
        try:
            await log.create([TopicSpec(name=topic, partitions=6, retention=None)])
        finally:
            await log.close()

    async def join(
        self, stack: AsyncExitStack, process: Measured, *, fan_out: int = 1, warms_up: bool = True, share: int = 1
    ) -> Contestant:
        stack.enter_context(process)
        await asyncio.to_thread(process.wait_until_it_listens)
        sender = Sender(process.port)
        stack.callback(sender.close)
        await sender.connect(share * CONNECTIONS)
        contestant = Contestant(process, sender, fan_out, share)
        if warms_up:
            await self.burst(contestant, WARM_UP)
        return contestant

    async def compare(
        self, name: str, contestants: Sequence[Contestant | list[Contestant]], *, events: int | None = None
    ) -> list[Bursts]:
        """Run them in turns, those of a list at once, with the plan's number of events or another."""
        task = self.progress.add_task(name, total=self.plan.rounds * len(contestants))
        rounds: list[list[tuple[float, float, float]]] = [[] for _ in contestants]
        for _ in range(self.plan.rounds):
            for contestant, of_one in zip(contestants, rounds, strict=True):
                of_one.append(await self.burst(contestant, events or self.plan.events))
                self.progress.advance(task)
        self.progress.remove_task(task)
        return [Bursts(*zip(*of_one, strict=True)) for of_one in rounds]

    async def burst(self, contestant: Contestant | list[Contestant], events: int) -> tuple[float, float, float]:
        """Send events to each and wait for their deliveries; return what `Bursts` has of one round.

        Raises RuntimeError unless exactly these events were delivered.
        """
        await asyncio.sleep(SETTLE)
        together = contestant if isinstance(contestant, list) else [contestant]
        destination = self.destination
        destination.forget()
        for each in together:
            each.sender.forget()
        count = events * sum([each.share for each in together])
        target = destination.received + events * sum([each.share * each.fan_out for each in together])
        began, cpu = time.monotonic(), sum([each.process.cpu_seconds() for each in together])
        accepted = max(await asyncio.gather(*[each.sender.burst(events * each.share) for each in together]))
        await destination.wait_for(target)
        seconds = time.monotonic() - began
        cpu = sum([each.process.cpu_seconds() for each in together]) - cpu
        destination.check([commit for each in together for commit in each.sender.sent])
        return 1e6 * cpu / count, count / accepted, count / seconds

    async def drip(self, name: str, sender: Sender) -> list[float]:
        """Send one event at a time; return the seconds from each response to its first byte at the destination."""
        task = self.progress.add_task(name, total=self.plan.drips)
        self.destination.forget()
        sender.forget()
        for _ in range(self.plan.drips // 10):
            await sender.drip(10, DRIP)
            self.progress.advance(task, 10)
        await asyncio.sleep(2 * SETTLE)
        self.progress.remove_task(task)
        return self.latencies([sender])

    def latencies(self, senders: Sequence[Sender]) -> list[float]:
        """Return the seconds from each response to the first byte of the event's first delivery."""
        times = self.destination.times
        return [max(0.0, times[commit] - at) for sender in senders for commit, at in sender.times.items()]


@asynccontextmanager
async def peak_memory(process: Measured) -> AsyncIterator[list[int]]:
    """Look at a process's memory meanwhile; the yielded list has its largest size, in bytes."""
    peak = [process.resident_bytes()]

    async def sample() -> None:
        while True:
            await asyncio.sleep(SAMPLED)
            peak[0] = max(peak[0], process.resident_bytes())

    task = asyncio.create_task(sample(), name="memory")
    try:
        yield peak
    finally:
        task.cancel()
