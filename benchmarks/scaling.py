"""`python -m benchmarks.scaling`: the cost of an event in each process, with one and two of each role, and a model.

Ingresses and routers are separate processes, on one Kafka node. If all of them share a few cores, more of them don't
get more done, so wall time says nothing about scaling; CPU time of each process does. The loads:

    burst     as fast as ingresses acknowledge and routers deliver
    fan-out   the same with four deliveries per event: the cost of a delivery, and of the event alone
    paced     a steady rate, with little to batch: the cost of an ordinary hour
    idle      no events

From these `fleet_for` sizes the fleet for a rate, with the model in docs/scaling.md.
"""

import argparse
import asyncio
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.processes import MeasuredProcess, gateway
from benchmarks.traffic import Destination, Sender, pace
from dev.kafka import Broker, KafkaMissingError
from gateway.log.base import Partition
from gateway.log.kafka.log import KafkaLog
from gateway.log.topics import Topics

CONNECTIONS = 64
WARM_UP = 2_000
FAN_OUT = 4
UTILISATION = 0.6
"""Target utilisation of a core: the rest is for peaks, a failed zone and a rolling upgrade."""
REPLICAS = 3
PARTITION_RATE = 2_000
"""Planned events per second and partition: a quarter of what one process delivers."""
JOINED = 5.0
"""Seconds until each router has its partitions after a start: a heartbeat, and some margin."""
SETTLE = 2.0
"""Seconds after the last event, for the commit and the cleanup of idle connections."""

Roles = Mapping[str, Sequence[MeasuredProcess]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a run."""

    events: int
    rate: int
    seconds: float


FULL = Size(events=30_000, rate=1_000, seconds=10.0)
QUICK = Size(events=6_000, rate=500, seconds=4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """The result of a load: CPU time in µs per event (idle: per second), by role, with the broker and this process."""

    load: str
    processes: int
    rate: float
    """Events per second."""
    cpu: Mapping[str, float]
    """Per role, all of its processes together; "kafka" is the broker, "bench" the sender and the destination."""
    busy: float
    """The share of all cores that they used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The inputs of the model: CPU time in µs, and bytes."""

    ingress: float
    """Per event."""
    event: float
    """Per event at the router, without its deliveries."""
    delivery: float
    idle: float
    """Per second of an idle router: long polls and commits."""
    kafka: float
    """Per event at the brokers, for one replica."""
    record: int
    """Per record of an event, before compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The fleet for a rate. Cores are counted at `UTILISATION`; one process uses one."""

    rate: float
    fan_out: float
    ingresses: int
    routers: int
    kafka_cores: int
    partitions: int
    megabytes_in: float
    """Per second from senders, and the same to the brokers before compression and replication."""
    megabytes_out: float
    """Per second to destinations."""


def fleet_for(costs: Costs, *, rate: float, fan_out: float) -> Fleet:
    """Return the fleet for a rate of events, with a number of deliveries each.

    Processes share only the log, so cores add up: rate x cost. Not included: slow destinations (attempts in flight cost
    memory, not CPU time), and retries (another delivery and two more records each).
    """
    usable = 1e6 * UTILISATION
    routers = math.ceil(rate * (costs.event + fan_out * costs.delivery) / (usable - costs.idle))
    megabytes = rate * costs.record / 1e6
    return Fleet(
        rate=rate,
        fan_out=fan_out,
        ingresses=math.ceil(rate * costs.ingress / usable),
        routers=routers,
        kafka_cores=math.ceil(rate * costs.kafka * REPLICAS / usable),
        # Several partitions per router, so they can be spread evenly, and none is too busy for one router.
        partitions=max(2 * routers, math.ceil(rate / PARTITION_RATE)),
        megabytes_in=megabytes,
        megabytes_out=megabytes * fan_out,
    )


class Scaling:
    """One run on one broker; this process is the sender and the destination."""

    def __init__(self, size: Size, folder: Path, servers: str, broker: int | None) -> None:
        self._size = size
        self._folder = folder
        self._servers = servers
        self._broker = None if broker is None else psutil.Process(broker)
        self._destination = Destination()
        self._port = 0

    async def run(self) -> tuple[list[Spent], Costs]:
        self._port = await self._destination.start()
        size = self._size
        spent: list[Spent] = []
        try:
            for processes in (1, 2):
                async with AsyncExitStack() as stack:
                    roles, senders = await self._start_all(stack, f"scaling{processes}", processes)
                    spent.append(await self._load("burst", roles, senders, size.events))
                    spent.append(
                        await self._load("paced", roles, senders, round(size.rate * size.seconds), rate=size.rate)
                    )
                    spent.append(await self._idle(roles))
            async with AsyncExitStack() as stack:
                roles, senders = await self._start_all(stack, "fan-out", 1, FAN_OUT)
                spent.append(await self._load("fan-out", roles, senders, size.events // FAN_OUT, fan_out=FAN_OUT))
            return spent, self._costs(spent, await self._record_size("scaling1."))
        finally:
            self._destination.close()

    async def _start_all(
        self, stack: AsyncExitStack, prefix: str, processes: int, fan_out: int = 1
    ) -> tuple[Roles, list[Sender]]:
        """Start `count` processes of both roles; return when they are warm, and each router has its partitions."""
        routers = await self._start(stack, "router", prefix, processes, fan_out)
        ingresses = await self._start(stack, "ingress", prefix, processes, fan_out)
        senders = [Sender(ingress.port) for ingress in ingresses]
        for sender in senders:
            stack.callback(sender.close)
            await sender.connect(CONNECTIONS // len(senders))
        roles = {"ingress": ingresses, "router": routers}
        await self._load("warm-up", roles, senders, WARM_UP, fan_out=fan_out)
        await asyncio.sleep(JOINED)
        await self._load("warm-up", roles, senders, WARM_UP, fan_out=fan_out)
        return roles, senders

    async def _load(
        self,
        name: str,
        roles: Roles,
        senders: Sequence[Sender],
        events: int,
        *,
        rate: float | None = None,
        fan_out: int = 1,
    ) -> Spent:
        """Send events, at a rate or as fast as possible, and wait until all are delivered."""
        self._destination.forget()
        for sender in senders:
            sender.forget()
        target = self._destination.received + events * fan_out
        with self._metered(name, roles, events) as spent:
            if rate is None:
                await asyncio.gather(*[sender.burst(events // len(senders)) for sender in senders])
            else:
                await pace(senders, rate=rate, count=events)
            await self._destination.wait_for(target)
        self._destination.check([commit for sender in senders for commit in sender.sent])
        return spent[0]

    async def _idle(self, roles: Roles) -> Spent:
        await asyncio.sleep(SETTLE)
        with self._metered("idle", roles, self._size.seconds) as spent:
            await asyncio.sleep(self._size.seconds)
        return spent[0]

    async def _start(
        self, stack: AsyncExitStack, role: str, prefix: str, processes: int, fan_out: int = 1
    ) -> list[MeasuredProcess]:
        started: list[MeasuredProcess] = []
        for number in range(processes):
            process = gateway(
                f"{prefix}-{role}-{number}",
                self._folder,
                log=f"kafka://{self._servers}",
                destination=self._port,
                role=role,
                fan_out=fan_out,
                prefix=prefix,
            )
            started.append(stack.enter_context(process))
            await asyncio.to_thread(process.wait_until_it_listens)
        return started

    @contextmanager
    def _metered(self, load: str, roles: Roles, events: float) -> Iterator[list[Spent]]:
        """Measure the block; the yielded list has the result afterwards."""
        spent: list[Spent] = []
        before, began = self._cpu(roles), time.monotonic()
        yield spent
        seconds = time.monotonic() - began
        cpu = {name: value - before[name] for name, value in self._cpu(roles).items()}
        spent.append(
            Spent(
                load=load,
                processes=max(map(len, roles.values())),
                rate=0.0 if load == "idle" else events / seconds,
                cpu={name: 1e6 * value / events for name, value in cpu.items()},
                busy=sum(cpu.values()) / seconds / (os.cpu_count() or 1),
            )
        )

    def _cpu(self, roles: Roles) -> dict[str, float]:
        cpu = {role: sum([process.cpu_seconds() for process in processes]) for role, processes in roles.items()}
        others = {"bench": psutil.Process()} | ({} if self._broker is None else {"kafka": self._broker})
        for name, process in others.items():
            times = process.cpu_times()
            cpu[name] = times.user + times.system
        return cpu

    async def _record_size(self, prefix: str) -> int:
        """Return the size in bytes of an event's record, as given to the producer."""
        log = await KafkaLog.open(self._servers)
        try:
            topic = Topics(prefix).events("github")
            for number, (start, end) in (await log.bounds(topic)).items():
                if end > start:
                    async for records in log.scan(Partition(topic, number), start, start + 1):
                        record = records[0]
                        headers = sum([len(name) + len(value) for name, value in record.headers])
                        return len(record.key) + len(record.value) + headers
        finally:
            await log.close()
        raise RuntimeError(f"{topic}: expected a record, got none")

    def _costs(self, spent: Sequence[Spent], record: int) -> Costs:
        """Return the costs of busy processes, like those of a large fleet: the higher ones of one and two of each."""

        def dearest(load: str, name: str) -> float:
            return max(
                [
                    each.cpu.get(name, math.nan) / (each.processes if load == "idle" else 1)
                    for each in spent
                    if each.load == load
                ]
            )

        one = next(each.cpu["router"] for each in spent if each.load == "burst")
        delivery = (dearest("fan-out", "router") - one) / (FAN_OUT - 1)
        return Costs(
            ingress=dearest("burst", "ingress"),
            event=max(0.0, dearest("burst", "router") - delivery),
            delivery=delivery,
            idle=dearest("idle", "router"),
            kafka=dearest("burst", "kafka"),
            record=record,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer events: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--rate", type=float, default=100_000.0, help="events a second to count a fleet for (100000)")
    parser.add_argument("--fan-out", type=float, default=2.0, help="deliveries of an event (2)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-scaling-")))
        servers, broker = os.environ.get("GATEWAY_TEST_KAFKA"), None
        if servers is None:
            try:
                started = Broker.start()
            except KafkaMissingError as error:
                print(error, file=sys.stderr)
                return 1
            stack.callback(started.stop)
            servers, broker = started.address, started.pid
        scaling = Scaling(QUICK if options.quick else FULL, folder, servers, broker)
        spent, costs = uvloop.run(scaling.run())
    fleet = fleet_for(costs, rate=options.rate, fan_out=options.fan_out)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load_before": os.getloadavg()[0]}
    if options.json:
        found = {"machine": machine, "spent": spent, "costs": asdict(costs), "fleet": asdict(fleet)}
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        _show(spent, costs, fleet)
    return 0


def _show(spent: Sequence[Spent], costs: Costs, fleet: Fleet) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        title="processor time, µs an event (idle: a second), of all processes of a role", title_justify="left"
    )
    for heading in ("load", "processes of each role", "events/s", "ingress", "router", "kafka", "bench", "cores busy"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    for each in spent:
        parts = [
            f"{each.cpu[name]:,.0f}" if name in each.cpu else "" for name in ("ingress", "router", "kafka", "bench")
        ]
        table.add_row(each.load, str(each.processes), f"{each.rate:,.0f}", *parts, f"{100 * each.busy:.0f} %")
    console.print(table)
    console.print(
        f"ingress {costs.ingress:.0f} µs an event; router {costs.event:.0f} µs an event and {costs.delivery:.0f} a "
        f"delivery, {costs.idle / 1e4:.1f} % of a core when idle; Kafka {costs.kafka:.0f} µs an event and replica; "
        f"a record has {costs.record:,} bytes"
    )
    console.print(
        f"{fleet.rate:,.0f} events/s of {fleet.fan_out:g} deliveries each, cores {100 * UTILISATION:.0f} % busy: "
        f"{fleet.ingresses} ingresses, {fleet.routers} routers, {fleet.kafka_cores} cores of brokers ({REPLICAS} "
        f"replicas), {fleet.partitions} partitions; {fleet.megabytes_in:,.0f} MB/s in, {fleet.megabytes_out:,.0f} out"
    )


if __name__ == "__main__":
    sys.exit(main())
