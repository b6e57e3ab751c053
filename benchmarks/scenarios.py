"""What a gateway does at sizes that are out of the ordinary. Each ends with a count: nothing may be missing.

python -m benchmarks --only large                bodies of 900 kB, 200 a second: half a minute
python -m benchmarks --only destinations         1,000 destinations of each event: a minute
python -m benchmarks --only idle-connections     50,000 connections of senders that send nothing: two minutes
python -m benchmarks --only catching-up          2,000,000 events of backlog (`benchmarks/catching_up.py`)
"""

import asyncio
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from statistics import quantiles

from benchmarks.catching_up import catch_up
from benchmarks.contest import MEBI, SETTLE, Contest, peak_memory
from benchmarks.figures import Figure
from benchmarks.payload import Pushes
from benchmarks.processes import MeasuredProcess, gateway
from benchmarks.traffic import Sender, pace

LARGE = 900_000
"""Bytes of a body. A record of Kafka has a megabyte at most, with its headers."""
LARGE_RATE = 200.0
LARGE_CONNECTIONS = 16
DESTINATIONS = 1_000
IDLE_BYTES = 8_000.0
"""Of memory for each idle connection, at most."""
OF_ONE_ADDRESS = 20_000
"""Connections of one loopback address: Linux gives some 28,000 ports to each."""
STEP = 1_000
"""Connections that are opened before the gateway has to have accepted them: its backlog is shorter than all of them."""
RESERVED = 5_120
"""Descriptors that a gateway keeps for all else, a quarter of all at most."""
SPARE = 1_024
"""Connections that are left: 512 of those that are being opened, and other senders'."""


async def large(contest: Contest) -> list[Figure]:
    count = contest.plan.large
    async with AsyncExitStack() as stack:
        process = _gateway(contest, "large")
        await contest.join(stack, process)
        sender = Sender(process.port, size=LARGE)
        stack.callback(sender.close)
        await sender.connect(LARGE_CONNECTIONS)
        await asyncio.sleep(SETTLE)
        contest.destination.forget()
        target = contest.destination.received + count
        began, cpu = time.monotonic(), process.cpu_seconds()
        async with peak_memory(process) as peak:
            await pace([sender], rate=LARGE_RATE, count=count)
            accepted = time.monotonic() - began
            await contest.destination.wait_for(target)
        cpu = process.cpu_seconds() - cpu
        contest.destination.check(sender.sent)
        cuts = quantiles(contest.latencies([sender]), n=100, method="inclusive")
    name = f"{count:,} bodies of {LARGE // 1000} kB at {LARGE_RATE:g}/s, all delivered"
    return [
        Figure(section="large", name=f"{name}: accepted", value=count / accepted, unit="/s"),
        Figure(section="large", name=f"{name}: CPU an event", value=1e6 * cpu / count, unit="µs"),
        Figure(section="large", name=f"{name}: 202 to first byte, p50", value=1e3 * cuts[49], unit="ms"),
        Figure(section="large", name=f"{name}: 202 to first byte, p99", value=1e3 * cuts[98], unit="ms"),
        Figure(section="large", name=f"{name}: resident at most", value=peak[0] / MEBI, unit="MiB"),
    ]


async def destinations(contest: Contest) -> list[Figure]:
    events = contest.plan.many
    async with AsyncExitStack() as stack:
        process = _gateway(contest, "destinations", routes=1, fan_out=DESTINATIONS)
        contestant = await contest.join(stack, process, fan_out=DESTINATIONS, warms_up=False)
        await contest.burst(contestant, 2)
        async with peak_memory(process) as peak:
            rounds = [await contest.burst(contestant, events) for _ in range(3)]
    name = f"{DESTINATIONS:,} destinations of one event, {events} events at once, all delivered"
    return [
        Figure.of_rounds(
            section="destinations",
            name=f"{name}: CPU a delivery",
            values=[cpu / DESTINATIONS for cpu, _, _ in rounds],
            unit="µs",
        ),
        Figure.of_rounds(
            section="destinations",
            name=f"{name}: deliveries",
            values=[DESTINATIONS * delivered for _, _, delivered in rounds],
            unit="/s",
        ),
        Figure(section="destinations", name=f"{name}: resident at most", value=peak[0] / MEBI, unit="MiB"),
    ]


async def idle_connections(contest: Contest) -> list[Figure]:
    count = _allowed_connections(contest.plan.idle)
    async with AsyncExitStack() as stack:
        process = _gateway(contest, "idle")
        contestant = await contest.join(stack, process)
        await contest.drip("warm-up", contestant.sender)
        before = process.resident_bytes()
        began = time.monotonic()
        connections = await asyncio.to_thread(_open, process, count)
        stack.callback(_close, connections)
        opened = time.monotonic() - began
        each = (process.resident_bytes() - before) / count
        await _send_on(contest, process, connections[:: max(1, count // STEP)])  # they are closed after 75 s
        cuts = quantiles(
            await contest.drip(f"beside {count:,} idle connections", contestant.sender), n=100, method="inclusive"
        )
    name = f"{count:,} idle connections"
    return [
        Figure(
            section="idle-connections", name=f"{name}: memory of each", value=each, unit="bytes", at_most=IDLE_BYTES
        ),
        Figure(section="idle-connections", name=f"{name}: opened", value=count / opened, unit="/s"),
        Figure(
            section="idle-connections", name=f"beside {name}: 202 to first byte, p99", value=1e3 * cuts[98], unit="ms"
        ),
    ]


def _gateway(contest: Contest, name: str, *, routes: int = 10, fan_out: int = 1) -> MeasuredProcess:
    return gateway(
        name,
        contest.folder,
        log=f"kafka://{contest.servers}",
        destination=contest.port,
        routes=routes,
        fan_out=fan_out,
    )


def _allowed_connections(wanted: int) -> int:
    """Return how many connections a process may have here, of those wanted, and let this one have them.

    Where the limit can't be raised, they are fewer.
    """
    needed = wanted + RESERVED + SPARE
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < needed:
        with suppress(ValueError, OSError):  # only with the capability to
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(wanted, soft - min(RESERVED, soft // 4) - SPARE)


def _open(process: MeasuredProcess, count: int) -> list[socket.socket]:
    """Open connections, from several addresses. Raises RuntimeError if the gateway doesn't have all of them."""
    connections: list[socket.socket] = []
    for number in range(count):
        connection = socket.socket()
        connections.append(connection)
        connection.bind((f"127.0.0.{2 + number // OF_ONE_ADDRESS}", 0))
        connection.connect(("127.0.0.1", process.port))
        if number % STEP == STEP - 1:
            _until_accepted(process, number + 1)
    return connections


def _until_accepted(process: MeasuredProcess, count: int) -> None:
    until = time.monotonic() + 30.0
    while (found := process.descriptors()) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"{process.name}: expected {count} open files, got {found}")
        time.sleep(0.05)


def _close(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        connection.close()


async def _send_on(contest: Contest, process: MeasuredProcess, connections: Sequence[socket.socket]) -> None:
    """Send an event on each of these, which shows that it is still open."""
    pushes = Pushes(process.port)
    contest.destination.forget()
    target = contest.destination.received + len(connections)

    def send() -> list[bytes]:
        commits = []
        for connection in connections:
            commit, request = pushes.next()
            connection.sendall(request)
            if not (received := connection.recv(4096)).startswith(b"HTTP/1.1 202"):
                raise RuntimeError(f"{process.name}: expected 202 on a connection that was idle, got {received!r}")
            commits.append(commit)
        return commits

    commits = await asyncio.to_thread(send)
    await contest.destination.wait_for(target)
    contest.destination.check(commits)


SCENARIOS: Mapping[str, Callable[[Contest], Awaitable[list[Figure]]]] = {
    "catching-up": catch_up,
    "large": large,
    "destinations": destinations,
    "idle-connections": idle_connections,
}
