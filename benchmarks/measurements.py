"""The measurements: sections of figures, each with its goal if it has one."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import orjson
from rich.progress import Progress

from benchmarks import rule_costs
from benchmarks.contest import MEBI, Contest, Contestant, Plan
from benchmarks.figures import Figure
from benchmarks.processes import MeasuredProcess, bare_pipeline, gateway
from benchmarks.scenarios import SCENARIOS
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression

FAN_OUT = 10
TWICE_LESS_A_TENTH = 1.11
"""How much more an event may cost with two processes, if they are to do 1.8 times as much on two cores."""
RELOADED = 10_000
RELOAD_SECONDS = 16.0
"""Seconds in which a changed file is seen, loaded and in force."""
EMAIL = r"^[\\w.-]{1,50}@\\w{1,50}$"


class Bench(Contest):
    """Runs sections one after the other."""

    def __init__(self, plan: Plan, folder: Path, servers: str, progress: Progress, *, other: str = "") -> None:
        super().__init__(plan, folder, servers, progress)
        self._other = other
        """Another interpreter, with what the gateway needs."""

    async def run(self, sections: Sequence[str]) -> list[Figure]:
        figures: list[Figure] = []
        async with self.open():
            for name in sections:
                if name == "interpreters":
                    figures += await self.interpreters()
                else:
                    figures += await (SECTIONS.get(name) or SCENARIOS[name])(self)
        return figures

    async def ingress(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            await self.create("bare-ingress.events")
            ours = await self.join(stack, self._gateway("ingress", role="ingress"), fan_out=0)
            theirs = await self.join(
                stack,
                bare_pipeline("bare-ingress", self.folder, servers=self.servers, topic="bare-ingress.events"),
                fan_out=0,
            )
            our, their = await self.compare("ingress on Kafka", [ours, theirs])
        return [
            Figure.of_rounds(
                section="ingress",
                name="ingress, Kafka: CPU an event",
                values=our.cpu,
                references=their.cpu,
                unit="µs",
                at_most=1.3,
            ),
            Figure.of_rounds(
                section="ingress",
                name="ingress, Kafka: acknowledged",
                values=our.accepted,
                references=their.accepted,
                unit="/s",
            ),
        ]

    async def path(self) -> list[Figure]:
        async with AsyncExitStack() as stack:
            await self.create("bare-path.events")
            ours = await self.join(stack, self._gateway("path"))
            theirs = await self.join(
                stack,
                bare_pipeline(
                    "bare-path",
                    self.folder,
                    servers=self.servers,
                    topic="bare-path.events",
                    destination=f"http://127.0.0.1:{self.port}/hooks/github",
                ),
            )
            our, their = await self.compare("whole path on Kafka", [ours, theirs])
        return [
            Figure.of_rounds(
                section="path",
                name="whole path, Kafka: CPU an event",
                values=our.cpu,
                references=their.cpu,
                unit="µs",
                at_most=1.3,
            ),
            Figure.of_rounds(
                section="path",
                name="whole path, Kafka: delivered",
                values=our.delivered,
                references=their.delivered,
                unit="/s",
            ),
        ]

    async def processes(self) -> list[Figure]:
        """Compare two processes of one command with one, and with two that have nothing to do with each other.

        Each process has as many connections and events. What two cost more in either case is the machine's doing: its
        cores, caches and broker are shared.
        """
        async with AsyncExitStack() as stack:
            one, two, *apart = [
                await self.join(stack, self._gateway(name, processes=count), share=count)
                for name, count in (("one", 1), ("two", 2), ("apart-1", 1), ("apart-2", 1))
            ]
            # A third of a round's events, as a round has five processes' bursts: connections wait for their turn.
            events = self.plan.events // 3
            of_one, of_two, of_apart = await self.compare("two processes", [one, two, apart], events=events)
        return [
            Figure.of_rounds(
                section="processes",
                name=f"two processes of one command beside {name}: {what}",
                values=values,
                references=references,
                unit=unit,
                at_most=TWICE_LESS_A_TENTH if unit == "µs" else None,
            )
            for bursts, name in ((of_one, "one"), (of_apart, "two that share nothing"))
            for what, values, references, unit in (
                ("CPU an event", of_two.cpu, bursts.cpu, "µs"),
                ("acknowledged", of_two.accepted, bursts.accepted, "/s"),
                ("delivered", of_two.delivered, bursts.delivered, "/s"),
            )
        ]

    async def attempts(self) -> list[Figure]:
        """Compare what is recorded of attempts with nothing, on both logs."""
        figures: list[Figure] = []
        for kind, is_embedded in (("Kafka", False), ("embedded log", True)):
            async with AsyncExitStack() as stack:
                contestants = [
                    await self.join(
                        stack, self._gateway(f"attempts-{which}-{kind[0]}", is_embedded=is_embedded, attempts=which)
                    )
                    for which in ("off", "failures", "all")
                ]
                off, failures, everything = await self.compare(f"attempts recorded, {kind}", contestants)
            for which, burst, at_most in (
                ("failures, of which there are none", failures, 1.02),
                ("all", everything, 1.08),
            ):
                figures.append(
                    Figure.of_rounds(
                        section="attempts",
                        name=f"whole path, {kind}, attempts recorded ({which}): CPU an event",
                        values=burst.cpu,
                        references=off.cpu,
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
                    await self.join(stack, gateway_, fan_out=int(role == "all"))
                    for gateway_ in (
                        self._gateway(f"{role}-here", role=role),
                        self._gateway(f"{role}-other", role=role, python=self._other),
                    )
                ]
                our, their = await self.compare(f"{name}, two interpreters", contestants)
            title = f"{name}, Kafka: CPU an event"
            figures.append(
                Figure.of_rounds(section="interpreters", name=title, values=our.cpu, references=their.cpu, unit="µs")
            )
        return figures

    async def routes(self) -> list[Figure]:
        counts = self.plan.routes
        async with AsyncExitStack() as stack:
            contestants = [
                await self.join(stack, self._gateway(f"routes-{count}", is_embedded=True, routes=count))
                for count in counts
            ]
            few, *more = await self.compare("number of routes", contestants)
        return [
            Figure.of_rounds(
                section="routes",
                name=f"whole path, {count:,} routes beside 10: CPU an event",
                values=burst.cpu,
                references=few.cpu,
                unit="µs",
                at_most=1.2,
            )
            for count, burst in zip(counts[1:], more, strict=True)
        ]

    async def rules(self) -> list[Figure]:
        task = self.progress.add_task("rules", total=4)
        figures: list[Figure] = []
        process = self._gateway("reload", is_embedded=True, routes=RELOADED)
        file = self.folder / "reload.yaml"
        async with AsyncExitStack() as stack:
            contestant = await self.join(stack, process)
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
            partial(rule_costs.match_figures, self.plan.rounds),
            partial(rule_costs.request_figures, self.folder, self.plan.rounds),
        ):
            self.progress.advance(task)
            figures += measure()
        self.progress.remove_task(task)
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
                await self.join(stack, self._gateway(f"ordered-{count}", is_embedded=True, ordered=count))
                for count in (0, 1, 10)
            ]
            none, one, ten = await self.compare("ordered routes", contestants)
        return [
            Figure.of_rounds(
                section="ordered",
                name="whole path, an ordered route beside a plain one: CPU an event",
                values=one.cpu,
                references=none.cpu,
                unit="µs",
            ),
            Figure.of_rounds(
                section="ordered",
                name="10 ordered routes, of which one matches, beside one: CPU an event",
                values=ten.cpu,
                references=one.cpu,
                unit="µs",
                at_most=3.0,
            ),
        ]

    async def patterns(self) -> list[Figure]:
        worst = Expression(rf"body.to.exists(t, t.matches('{EMAIL}'))")
        routes = [Expression(f"body.action.matches('^(re)?opened( by .* in {n})?$')") for n in range(1_000)]
        blocked, each = [], []
        for _ in range(self.plan.rounds):
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
            ingress = await self.join(
                stack, self._gateway("embedded-ingress", is_embedded=True, role="ingress"), fan_out=0
            )
            whole = await self.join(stack, self._gateway("embedded", is_embedded=True))
            alone, both = await self.compare("embedded log", [ingress, whole])
        return [
            Figure.of_rounds(section="embedded", name=f"{name}, embedded log: {what}", values=values, unit=unit)
            for name, what, values, unit in (
                ("ingress", "acknowledged", alone.accepted, "/s"),
                ("ingress", "CPU an event", alone.cpu, "µs"),
                ("whole path", "delivered", both.delivered, "/s"),
                ("whole path", "CPU an event", both.cpu, "µs"),
            )
        ]

    async def fan_out(self) -> list[Figure]:
        """Compare ten deliveries of an event with one."""
        async with AsyncExitStack() as stack:
            one, ten = [
                await self.join(stack, self._gateway(f"fan-out-{count}", fan_out=count), fan_out=count)
                for count in (1, FAN_OUT)
            ]
            single, many = await self.compare("fan-out", [one, ten])
        return [
            Figure.of_rounds(
                section="fan-out",
                name=f"whole path, Kafka, {FAN_OUT} destinations beside one: CPU an event",
                values=many.cpu,
                references=single.cpu,
                unit="µs",
            ),
            Figure.of_rounds(
                section="fan-out",
                name=f"whole path, Kafka, {FAN_OUT} destinations beside one: deliveries",
                values=[FAN_OUT * rate for rate in many.delivered],
                references=single.delivered,
                unit="/s",
            ),
        ]

    async def latency(self) -> list[Figure]:
        figures: list[Figure] = []
        for kind, is_embedded in (("Kafka", False), ("embedded log", True)):
            async with AsyncExitStack() as stack:
                name = f"latency-{kind.partition(' ')[0].lower()}"
                idle = await self.join(stack, self._gateway(name, is_embedded=is_embedded))
                seconds = await self.drip(f"idle latency, {kind}", idle.sender)
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
        task = self.progress.add_task("memory", total=self.plan.memory[-1])
        async with AsyncExitStack() as stack:
            contestant = await self.join(stack, self._gateway("memory"), warms_up=False)
            done = 0
            for count in self.plan.memory:
                while done < count:
                    step = min(5_000, count - done)
                    await self.burst(contestant, step)
                    done += step
                    self.progress.advance(task, step)
                figures.append(
                    Figure(
                        section="memory",
                        name=f"resident after {count:,} events, Kafka",
                        value=contestant.process.resident_bytes() / MEBI,
                        unit="MiB",
                        at_most=120.0,
                    )
                )
        self.progress.remove_task(task)
        return figures

    def _gateway(
        self,
        name: str,
        *,
        is_embedded: bool = False,
        role: str = "all",
        routes: int = 10,
        fan_out: int = 1,
        ordered: int = 0,
        attempts: str = "failures",
        processes: int = 1,
        python: str = sys.executable,
    ) -> MeasuredProcess:
        log = f"sqlite:///{self.folder / name}.db" if is_embedded else f"kafka://{self.servers}"
        return gateway(
            name,
            self.folder,
            log=log,
            destination=self.port,
            role=role,
            routes=routes,
            fan_out=fan_out,
            ordered=ordered,
            attempts=attempts,
            processes=processes,
            python=python,
        )


def _view(body: Mapping[str, object]) -> EventView:
    return EventView(source="open", headers=(), query="", body=orjson.dumps(body))


SECTIONS: Mapping[str, Callable[[Bench], Awaitable[list[Figure]]]] = {
    "ingress": Bench.ingress,
    "path": Bench.path,
    "processes": Bench.processes,
    "attempts": Bench.attempts,
    "routes": Bench.routes,
    "rules": Bench.rules,
    "ordered": Bench.ordered,
    "patterns": Bench.patterns,
    "embedded": Bench.embedded,
    "fan-out": Bench.fan_out,
    "latency": Bench.latency,
    "memory": Bench.memory,
}
