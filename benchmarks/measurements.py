"""The measurements: sections of figures, each with its goal if it has one."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import orjson
from rich.progress import Progress

from benchmarks import rule_costs
from benchmarks.figures import Figure
from benchmarks.processes import MeasuredProcess, bare_pipeline, gateway
from benchmarks.traffic import Destination, Sender
from gateway.log.base import TopicSpec
from gateway.log.kafka.log import KafkaLog
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression

CONNECTIONS = 64
SETTLE = 0.2  # Seconds between bursts, for the commit and the log lines of the last one.
DRIP = 0.05  # Seconds between events when the gateway is otherwise idle.
MEBI = 1 << 20
RELOADED = 10_000
RELOAD_SECONDS = 16.0
"""Seconds in which a changed file is seen, loaded and in force."""
EMAIL = r"^[\\w.-]{1,50}@\\w{1,50}$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The size of a run; `memory` are the numbers of events after which memory is measured."""

    rounds: int
    events: int
    drips: int
    memory: tuple[int, ...]


FULL = Plan(rounds=7, events=8_000, drips=300, memory=(50_000, 100_000, 150_000))
QUICK = Plan(rounds=3, events=2_000, drips=60, memory=(10_000, 20_000))


class Burst(NamedTuple):
    """The result of one burst: CPU time (µs per event), events per second acknowledged and delivered."""

    cpu: float
    accepted: float
    delivered: float


class Contestant(NamedTuple):
    """A process with its sender; `delivers` is whether its events reach the destination."""

    process: MeasuredProcess
    sender: Sender
    delivers: bool


class Bench:
    """Runs sections one after the other, in the loop that also sends and receives."""

    def __init__(self, plan: Plan, folder: Path, servers: str, progress: Progress, *, other: str = "") -> None:
        self._plan = plan
        self._other = other
        """Another interpreter, with what the gateway needs."""
        self._folder = folder
        self._servers = servers
        self._progress = progress
        self._destination: Destination
        self._port = 0

    async def run(self, sections: Sequence[str]) -> list[Figure]:
        self._destination = Destination()
        self._port = await self._destination.start()
        figures: list[Figure] = []
        try:
            for name in sections:
                figures += await (Bench.interpreters if name == "interpreters" else SECTIONS[name])(self)
        finally:
            self._destination.close()
        return figures

    async def ingress(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            await self._create("bare-ingress.events")
            ours = await self._join(stack, self._gateway("ingress", role="ingress"), delivers=False)
            theirs = await self._join(
                stack,
                bare_pipeline("bare-ingress", self._folder, servers=self._servers, topic="bare-ingress.events"),
                delivers=False,
            )
            our, their = await self._compare("ingress on Kafka", [ours, theirs])
        return [
            Figure(
                section="ingress",
                name="ingress, Kafka: CPU an event",
                value=our.cpu,
                reference=their.cpu,
                unit="µs",
                at_most=1.3,
            ),
            Figure(
                section="ingress",
                name="ingress, Kafka: acknowledged",
                value=our.accepted,
                reference=their.accepted,
                unit="/s",
            ),
        ]

    async def path(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            await self._create("bare-path.events")
            ours = await self._join(stack, self._gateway("path"))
            theirs = await self._join(
                stack,
                bare_pipeline(
                    "bare-path", self._folder, servers=self._servers, topic="bare-path.events", destination=self._port
                ),
            )
            our, their = await self._compare("whole path on Kafka", [ours, theirs])
        return [
            Figure(
                section="path",
                name="whole path, Kafka: CPU an event",
                value=our.cpu,
                reference=their.cpu,
                unit="µs",
                at_most=1.3,
            ),
            Figure(
                section="path",
                name="whole path, Kafka: delivered",
                value=our.delivered,
                reference=their.delivered,
                unit="/s",
            ),
        ]

    async def attempts(self) -> list[Figure]:
        """Compare what is recorded of attempts with nothing, on both logs."""
        figures: list[Figure] = []
        for kind, is_embedded in (("Kafka", False), ("embedded log", True)):
            async with AsyncExitStack() as stack:
                contestants = [
                    await self._join(
                        stack, self._gateway(f"attempts-{which}-{kind[0]}", is_embedded=is_embedded, attempts=which)
                    )
                    for which in ("off", "failures", "all")
                ]
                off, failures, everything = await self._compare(f"attempts recorded, {kind}", contestants)
            for which, burst, at_most in (
                ("failures, of which there are none", failures, 1.02),
                ("all", everything, 1.08),
            ):
                figures.append(
                    Figure(
                        section="attempts",
                        name=f"whole path, {kind}, attempts recorded ({which}): CPU an event",
                        value=burst.cpu,
                        reference=off.cpu,
                        unit="µs",
                        at_most=at_most,
                    )
                )
        return figures

    async def interpreters(self) -> list[Figure]:
        """Compare the gateway on this interpreter with the gateway on the other one."""
        figures: list[Figure] = []
        for role, name in (("ingress", "ingress"), ("all", "whole path")):
            async with AsyncExitStack() as stack:
                contestants = [
                    await self._join(stack, gateway_, delivers=role == "all")
                    for gateway_ in (
                        self._gateway(f"{role}-here", role=role),
                        self._gateway(f"{role}-other", role=role, python=self._other),
                    )
                ]
                our, their = await self._compare(f"{name}, two interpreters", contestants)
            title = f"{name}, Kafka: CPU an event"
            figures.append(Figure(section="interpreters", name=title, value=our.cpu, reference=their.cpu, unit="µs"))
        return figures

    async def routes(self) -> list[Figure]:
        counts = (10, 1_000, 10_000)
        async with AsyncExitStack() as stack:
            contestants = [
                await self._join(stack, self._gateway(f"routes-{count}", is_embedded=True, routes=count))
                for count in counts
            ]
            few, *more = await self._compare("number of routes", contestants)
        return [
            Figure(
                section="routes",
                name=f"whole path, {count:,} routes beside 10: CPU an event",
                value=burst.cpu,
                reference=few.cpu,
                unit="µs",
                at_most=1.2,
            )
            for count, burst in zip(counts[1:], more, strict=True)
        ]

    async def rules(self) -> list[Figure]:
        task = self._progress.add_task("rules", total=4)
        figures: list[Figure] = []
        process = self._gateway("reload", is_embedded=True, routes=RELOADED)
        file = self._folder / "reload.yaml"
        async with AsyncExitStack() as stack:
            contestant = await self._join(stack, process)
            before = max(await self._acknowledged_in(contestant, seconds=RELOAD_SECONDS))
            async with asyncio.TaskGroup() as tasks:
                during = tasks.create_task(self._acknowledged_in(contestant, seconds=RELOAD_SECONDS))
                await asyncio.sleep(RELOAD_SECONDS / 4)
                await asyncio.to_thread(file.write_text, file.read_text().replace("build-7,", "build-seven,"))
            if not process.has_written("rules_reloaded"):
                raise RuntimeError(f"expected a reload within {RELOAD_SECONDS:g} s, got none")
        name = f"reload {RELOADED:,} routes under load: the longest acknowledgement"
        figures += [
            Figure(section="rules", name=name, value=1000 * max(during.result()), unit="ms"),
            Figure(section="rules", name="the longest one in as many seconds without", value=1000 * before, unit="ms"),
        ]
        for measure in (
            partial(rule_costs.load_figures, file, RELOADED),
            partial(rule_costs.match_figures, self._plan.rounds),
            partial(rule_costs.request_figures, self._folder, self._plan.rounds),
        ):
            self._progress.advance(task)
            figures += measure()
        self._progress.remove_task(task)
        return figures

    async def _acknowledged_in(self, contestant: Contestant, *, seconds: float) -> list[float]:
        """Send about a thousand events a second, one after another; return the seconds until each is acknowledged."""
        until, found = time.monotonic() + seconds, []
        while time.monotonic() < until:
            found.append(await contestant.sender.burst(1))
            await asyncio.sleep(0.0005)
        return found

    async def ordered(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            contestants = [
                await self._join(stack, self._gateway(f"ordered-{count}", is_embedded=True, ordered=count))
                for count in (0, 1, 10)
            ]
            none, one, ten = await self._compare("ordered routes", contestants)
        return [
            Figure(
                section="ordered",
                name="whole path, an ordered route beside a plain one: CPU an event",
                value=one.cpu,
                reference=none.cpu,
                unit="µs",
            ),
            Figure(
                section="ordered",
                name="10 ordered routes, of which one matches, beside one: CPU an event",
                value=ten.cpu,
                reference=one.cpu,
                unit="µs",
                at_most=3.0,
            ),
        ]

    async def patterns(self) -> list[Figure]:
        worst = Expression(rf"body.to.exists(t, t.matches('{EMAIL}'))")
        routes = [Expression(f"body.action.matches('^(re)?opened( by .* in {n})?$')") for n in range(1_000)]
        blocked, each = [], []
        for _ in range(self._plan.rounds):
            began = time.process_time()
            worst.is_true(_view({"to": ["aa"] * 3_000}))
            blocked.append(time.process_time() - began)
            view, began = _view({"action": "opened"}), time.process_time()
            for route in routes:
                route.is_true(view)
            each.append((time.process_time() - began) / len(routes))
        name = "`matches` on 3,000 texts, a body of 15 kB: the loop stands still for"
        return [
            Figure(section="patterns", name=name, value=1e3 * median(blocked), unit="ms", at_most=20.0),
            Figure(
                section="patterns", name="a route whose condition is one `matches`", value=1e6 * median(each), unit="µs"
            ),
        ]

    async def embedded(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            ingress = await self._join(
                stack, self._gateway("embedded-ingress", is_embedded=True, role="ingress"), delivers=False
            )
            whole = await self._join(stack, self._gateway("embedded", is_embedded=True))
            alone, both = await self._compare("embedded log", [ingress, whole])
        return [
            Figure(section="embedded", name="ingress, embedded log: acknowledged", value=alone.accepted, unit="/s"),
            Figure(section="embedded", name="ingress, embedded log: CPU an event", value=alone.cpu, unit="µs"),
            Figure(section="embedded", name="whole path, embedded log: delivered", value=both.delivered, unit="/s"),
            Figure(section="embedded", name="whole path, embedded log: CPU an event", value=both.cpu, unit="µs"),
        ]

    async def latency(self) -> list[Figure]:
        figures: list[Figure] = []
        for kind, is_embedded in (("Kafka", False), ("embedded log", True)):
            async with AsyncExitStack() as stack:
                name = f"latency-{kind.partition(' ')[0].lower()}"
                idle = await self._join(stack, self._gateway(name, is_embedded=is_embedded))
                seconds = await self._drip(f"idle latency, {kind}", idle.sender)
            cuts = quantiles(seconds, n=100, method="inclusive")
            for name, value, at_most in (("p50", cuts[49], None), ("p99", cuts[98], 20.0)):
                figures.append(
                    Figure(
                        section="latency",
                        name=f"idle, {kind}: 202 to first byte, {name}",
                        value=1000 * value,
                        unit="ms",
                        at_most=at_most,
                    )
                )
        return figures

    async def memory(self) -> list[Figure]:
        figures: list[Figure] = []
        task = self._progress.add_task("memory", total=self._plan.memory[-1])
        async with AsyncExitStack() as stack:
            contestant = await self._join(stack, self._gateway("memory"), warms_up=False)
            done = 0
            for count in self._plan.memory:
                while done < count:
                    step = min(5_000, count - done)
                    await self._burst(contestant, step)
                    done += step
                    self._progress.advance(task, step)
                figures.append(
                    Figure(
                        section="memory",
                        name=f"resident after {count:,} events, Kafka",
                        value=contestant.process.resident_bytes() / MEBI,
                        unit="MiB",
                        at_most=120.0,
                    )
                )
        self._progress.remove_task(task)
        return figures

    def _gateway(
        self,
        name: str,
        *,
        is_embedded: bool = False,
        role: str = "all",
        routes: int = 10,
        ordered: int = 0,
        attempts: str = "failures",
        python: str = sys.executable,
    ) -> MeasuredProcess:
        log = f"sqlite:///{self._folder / name}.db" if is_embedded else f"kafka://{self._servers}"
        return gateway(
            name,
            self._folder,
            log=log,
            destination=self._port,
            role=role,
            routes=routes,
            ordered=ordered,
            attempts=attempts,
            python=python,
        )

    async def _create(self, topic: str) -> None:
        log = await KafkaLog.open(self._servers)
        try:
            await log.create([TopicSpec(name=topic, partitions=6, retention=None)])
        finally:
            await log.close()

    async def _join(
        self, stack: AsyncExitStack, process: MeasuredProcess, *, delivers: bool = True, warms_up: bool = True
    ) -> Contestant:
        stack.enter_context(process)
        await asyncio.to_thread(process.wait_until_it_listens)
        sender = Sender(process.port)
        stack.callback(sender.close)
        await sender.connect(CONNECTIONS)
        contestant = Contestant(process, sender, delivers)
        if warms_up:
            await self._burst(contestant, 1_000)
        return contestant

    async def _compare(self, name: str, contestants: Sequence[Contestant]) -> list[Burst]:
        """Run them in turns; return the medians of each."""
        task = self._progress.add_task(name, total=self._plan.rounds * len(contestants))
        bursts: list[list[Burst]] = [[] for _ in contestants]
        for _ in range(self._plan.rounds):
            for contestant, of_one in zip(contestants, bursts, strict=True):
                of_one.append(await self._burst(contestant, self._plan.events))
                self._progress.advance(task)
        self._progress.remove_task(task)
        return [Burst(*[median(values) for values in zip(*of_one, strict=True)]) for of_one in bursts]

    async def _burst(self, contestant: Contestant, events: int) -> Burst:
        await asyncio.sleep(SETTLE)
        process, sender, delivers = contestant
        target = self._destination.received + events
        began, cpu = time.monotonic(), process.cpu_seconds()
        accepted = await sender.burst(events)
        if delivers:
            await self._destination.wait_for(target)
        seconds = time.monotonic() - began
        cpu = process.cpu_seconds() - cpu
        return Burst(1e6 * cpu / events, events / accepted, events / seconds)

    async def _drip(self, name: str, sender: Sender) -> list[float]:
        task = self._progress.add_task(name, total=self._plan.drips)
        destination = self._destination
        destination.keeps_times = True
        for _ in range(self._plan.drips // 10):
            await sender.drip(10, DRIP)
            self._progress.advance(task, 10)
        await asyncio.sleep(2 * SETTLE)
        destination.keeps_times = False
        self._progress.remove_task(task)
        return [max(0.0, destination.times.pop(identity) - at) for identity, at in sender.times.items()]


def _view(body: Mapping[str, object]) -> EventView:
    return EventView(source="open", headers=(), query="", body=orjson.dumps(body))


SECTIONS: Mapping[str, Callable[[Bench], Awaitable[list[Figure]]]] = {
    "ingress": Bench.ingress,
    "path": Bench.path,
    "attempts": Bench.attempts,
    "routes": Bench.routes,
    "rules": Bench.rules,
    "ordered": Bench.ordered,
    "patterns": Bench.patterns,
    "embedded": Bench.embedded,
    "latency": Bench.latency,
    "memory": Bench.memory,
}
