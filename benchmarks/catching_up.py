"""A backlog on Kafka, five destinations of which one is dead: `python -m benchmarks --only catching-up`.

    1  as fast as events are acknowledged and delivered, nothing waiting: the live rate, and the p99 of a steady 100/s
    2  the gateway is stopped, and the backlog appended: its events are for the five destinations in turn
    3  it starts again. From its first delivery until the four have all of theirs, events of another source come at a
       steady rate for the four: they are the live ones, whose p99 is compared with that of before
    4  the fifth comes back, and gets what it missed

With 2,000,000 events it takes about a quarter of an hour, and 10 GB on the disk; `--backlog EVENTS` is another size.
"""

import asyncio
import time
from contextlib import AsyncExitStack
from statistics import quantiles

from benchmarks.contest import CONNECTIONS, MEBI, Contest, peak_memory
from benchmarks.figures import Figure
from benchmarks.payload import SECRET, Pushes
from benchmarks.processes import MeasuredProcess, gateway
from benchmarks.traffic import Destination, Sender, pace
from gateway.log.kafka.log import KafkaLog
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import Event, EventId
from tests.gateway_process import free_ports

NAME = "catching-up"
ALIVE = ("t0", "t1", "t2", "t3")
"""Types of events, each for a destination of its own."""
DEAD = "t4"
LIVE_EVENTS = 20_000
LIVE_RATE = 100.0
LIVE_SECONDS = 20.0
AT_ONCE = 500
"""Appends of the backlog that are on their way at a time."""
HEADERS = (
    (b"Host", b"127.0.0.1"),
    (b"User-Agent", b"GitHub-Hookshot/044aadd"),
    (b"Content-Type", b"application/json"),
    (b"X-Hub-Signature-256", b"sha256=" + b"a" * 64),
)
MAX_MEMORY = 256.0  # MiB
SLOWEST, LATEST = 0.8, 2.0
"""Of the live rate at least, and of the live p99 at most."""


async def catch_up(contest: Contest) -> list[Figure]:
    backlog = contest.plan.backlog
    [dead_port] = free_ports(1)
    live_events = min(LIVE_EVENTS, backlog)
    async with AsyncExitStack() as stack:
        process = await _start(contest, stack, dead_port)
        live_rate = await _live_rate(contest, process, live_events)
        alone = await _live_p99(contest, process)
    pushes = Pushes(0)
    commits = await _append(contest, pushes, backlog)
    alive = [commit for name in ALIVE for commit in commits[name]]
    destination, returned = contest.destination, Destination()
    destination.forget()
    async with AsyncExitStack() as stack:
        process = await _start(contest, stack, dead_port)
        before = destination.received
        live = await _connect(stack, process, "/in/live")
        await destination.wait_for(before + 1)  # once it has joined its group
        began = time.monotonic()
        async with peak_memory(process) as peak:
            task = contest.progress.add_task("backlog", total=len(alive))
            while (done := destination.received - before - len(live.sent)) < len(alive) - live_events / 10:
                await pace([live], rate=LIVE_RATE, count=round(LIVE_RATE))
                contest.progress.update(task, completed=done)
            await destination.wait_for(before + len(alive) + len(live.sent))
            drained = time.monotonic() - began
            contest.progress.remove_task(task)
        destination.check_once([*alive, *live.sent])
        beside = _p99(contest, live)
        back = time.monotonic()
        await returned.start(dead_port)
        stack.callback(returned.close)
        await returned.wait_for(len(commits[DEAD]))
        back = time.monotonic() - back
        returned.check_once(commits[DEAD])
    name = f"{backlog:,} events of backlog, one of five destinations dead"
    return [
        Figure(
            section=NAME,
            name=f"{name}: delivered, beside the live rate",
            value=len(alive) / drained,
            reference=live_rate,
            unit="/s",
            at_least=SLOWEST,
        ),
        Figure(section=NAME, name="until the four had all of it", value=drained, unit="s"),
        Figure(
            section=NAME,
            name="p99 of live events for the four: meanwhile, beside before",
            value=beside,
            reference=alone,
            unit="ms",
            at_most=LATEST,
        ),
        Figure(section=NAME, name="resident at most", value=peak[0] / MEBI, unit="MiB", at_most=MAX_MEMORY),
        Figure(section=NAME, name="until the fifth, back again, had all of it", value=back, unit="s"),
        Figure(section=NAME, name="delivered more than once", value=destination.repeated + returned.repeated, unit=""),
    ]


async def _start(contest: Contest, stack: AsyncExitStack, dead: int) -> MeasuredProcess:
    process = gateway(
        NAME, contest.folder, log=f"kafka://{contest.servers}", destination=contest.port, rules=_rules(contest, dead)
    )
    stack.enter_context(process)
    await asyncio.to_thread(process.wait_until_it_listens)
    return process


async def _connect(stack: AsyncExitStack, process: MeasuredProcess, path: str) -> Sender:
    sender = Sender(process.port, path, types=ALIVE)
    stack.callback(sender.close)
    await sender.connect(CONNECTIONS)
    return sender


async def _live_rate(contest: Contest, process: MeasuredProcess, events: int) -> float:
    """Return events per second, delivered as fast as they are acknowledged. The first of two rounds warms up."""
    rate = 0.0
    async with AsyncExitStack() as stack:
        sender = await _connect(stack, process, "/in/github")
        for _ in range(2):
            sender.forget()
            contest.destination.forget()
            target = contest.destination.received + events
            began = time.monotonic()
            await sender.burst(events)
            await contest.destination.wait_for(target)
            rate = events / (time.monotonic() - began)
            contest.destination.check_once(sender.sent)
    return rate


async def _live_p99(contest: Contest, process: MeasuredProcess) -> float:
    async with AsyncExitStack() as stack:
        sender = await _connect(stack, process, "/in/live")
        contest.destination.forget()
        count = round(LIVE_RATE * LIVE_SECONDS)
        target = contest.destination.received + count
        await pace([sender], rate=LIVE_RATE, count=count)
        await contest.destination.wait_for(target)
        return _p99(contest, sender)


def _p99(contest: Contest, sender: Sender) -> float:
    return 1e3 * quantiles(contest.latencies([sender]), n=100, method="inclusive")[98]


async def _append(contest: Contest, pushes: Pushes, backlog: int) -> dict[str, list[bytes]]:
    """Append a backlog of events, as an ingress would; return the commits of each type."""
    types = (*ALIVE, DEAD)
    commits: dict[str, list[bytes]] = {name: [] for name in types}
    task = contest.progress.add_task("backlog appended", total=backlog)
    topic = Topics(f"{NAME}.").events("github")
    log = await KafkaLog.open(contest.servers)
    try:
        for first in range(0, backlog, AT_ONCE):
            events = []
            for number in range(first, min(first + AT_ONCE, backlog)):
                name = types[number % len(types)]
                commit, body = pushes.body()
                commits[name].append(commit)
                events.append(_event(number, name, body))
            await asyncio.gather(
                *[
                    log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
                    for event in events
                ]
            )
            contest.progress.advance(task, len(events))
    finally:
        await log.close()
    contest.progress.remove_task(task)
    return commits


def _event(number: int, name: str, body: bytes) -> Event:
    return Event(
        id=EventId(f"evt_{number:032x}"),
        source="github",
        type=name,
        key=None,
        received_at=time.time(),
        headers=HEADERS,
        query="",
        body=body,
    )


def _rules(contest: Contest, dead: int) -> str:
    verify = f'{{verify: {{scheme: github, secrets: ["{SECRET}"]}}}}'
    lines = ["version: 1", f"sources: {{github: {verify}, live: {verify}}}", "destinations:"]
    lines += [f"  {name}: {{url: 'http://127.0.0.1:{contest.port}/hooks/{name}'}}" for name in ALIVE]
    lines += [f"  {DEAD}: {{url: 'http://127.0.0.1:{dead}/hooks/{DEAD}'}}", "routes:"]
    for source in ("github", "live"):
        lines += [
            f"  - {{name: {source}-{name}, from: {source}, match: {{type: {name}}}, to: [{name}], "
            "retry: {schedule: [5s, 10s, 20s], max_attempts: 1000, max_age: 1d}}"
            for name in (*ALIVE, DEAD)
        ]
    return "\n".join(lines) + "\n"
