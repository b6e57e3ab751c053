"""`python -m benchmarks.peers`: the same events by the same way, from sender to destination, by several programs.

Each takes POSTs with GitHub's signature, verifies it, appends to Kafka (acks=all), responds, reads from Kafka and posts
to one destination. They take turns, and of each round it is checked that exactly the events that were sent have
arrived. The processor time is that of all of a peer's processes, as the system accounts it.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles

import orjson
import uvloop
from rich.table import Table

from benchmarks.contest import FULL, MEBI, Bursts, Contest, Plan
from benchmarks.peers import bare, bento, go_floor, ours
from benchmarks.peers.peer import Peer, Setting
from benchmarks.run import Run, benchmark_run, number, print_table
from dev.kafka import KafkaMissingError
from dev.tools import ToolMissingError

PEERS = {peer.name: peer for peer in (ours.PEER, bare.PEER, go_floor.PEER, bento.PEER)}
PLAN = replace(FULL, rounds=3, events=10_000, drips=200)
QUICK = replace(PLAN, events=2_000, drips=40)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one peer: medians of the rounds, each with the least and the most of them."""

    name: str
    about: str
    cpu: tuple[float, float, float]
    """µs an event."""
    accepted: tuple[float, float, float]
    """Events per second."""
    delivered: tuple[float, float, float]
    p50: float
    """Milliseconds from the response to the first byte at the destination, while nothing else is on its way."""
    p99: float
    resident: float
    """MiB, of all its processes, after all rounds."""


async def compare(run: Run, plan: Plan, peers: Sequence[Peer]) -> list[Result]:
    contest = Contest(plan, run.folder, run.servers, run.progress)
    async with contest.open(), AsyncExitStack() as stack:
        contestants = []
        for number_, peer in enumerate(peers):
            topic = f"peer-{number_}.events"
            await contest.create(topic)
            url = f"http://127.0.0.1:{contest.port}/hooks/{number_}"
            setting = Setting(folder=run.folder, servers=run.servers, topic=topic, url=url)
            contestants.append(await contest.join(stack, peer.start(setting)))
        bursts = await contest.compare("peers", contestants)
        results = []
        for peer, contestant, of_one in zip(peers, contestants, bursts, strict=True):
            cuts = quantiles(await contest.drip(f"idle: {peer.name}", contestant.sender), n=100, method="inclusive")
            resident = contestant.process.resident_bytes() / MEBI
            results.append(_result(peer, of_one, p50=1e3 * cuts[49], p99=1e3 * cuts[98], resident=resident))
        return results


def _result(peer: Peer, bursts: Bursts, *, p50: float, p99: float, resident: float) -> Result:
    cpu, accepted, delivered = [(median(values), min(values), max(values)) for values in bursts]
    return Result(
        name=peer.name,
        about=peer.about,
        cpu=cpu,
        accepted=accepted,
        delivered=delivered,
        p50=p50,
        p99=p99,
        resident=resident,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer events")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(PEERS), help=f"of {', '.join(PEERS)}")
    options = parser.parse_args()
    peers = [PEERS[name] for name in options.only or PEERS]
    try:
        with benchmark_run() as run:
            results = uvloop.run(compare(run, QUICK if options.quick else PLAN, peers))
    except (KafkaMissingError, ToolMissingError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        found = {"machine": run.machine, "peers": [asdict(result) for result in results]}
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return 0
    table = Table(title="the whole path on Kafka, median of the rounds (least to most)", title_justify="left")
    for heading in ("", "CPU an event", "delivered", "accepted", "idle p50 / p99", "resident"):
        table.add_column(heading, justify="right" if heading else "left")
    for result in results:
        table.add_row(
            result.name,
            f"{_spread(result.cpu)} µs",
            f"{_spread(result.delivered)} /s",
            f"{_spread(result.accepted)} /s",
            f"{result.p50:.1f} / {result.p99:.1f} ms",
            f"{result.resident:.0f} MiB",
        )
    print_table(table, run.machine)
    return 0


def _spread(values: tuple[float, float, float]) -> str:
    middle, least, most = map(number, values)
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    sys.exit(main())
