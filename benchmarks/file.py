"""The size of the embedded log's file: `python -m benchmarks.file`, about 30 s."""

import asyncio
import os
import tempfile
from pathlib import Path

from gateway.log.base import TopicSpec
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event, event_key
from gateway.model import Event, EventId

BODIES = (500, 1000, 2000, 4000, 8000)
EVENTS, AT_ONCE = 5_000, 50
TOLD = 100_000
HEADERS = {
    "Host": "hooks.example.com",
    "User-Agent": "GitHub-Hookshot/044aadd",
    "Content-Type": "application/json",
    "X-GitHub-Event": "push",
    "X-GitHub-Delivery": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
    "X-Hub-Signature-256": f"sha256={'a' * 64}",
}


def main() -> None:
    """Print a row for each body size."""
    for size in BODIES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gateway.db"
            asyncio.run(_fill(path, size))
            taken = path.stat().st_size
        print(f"bodies of {size:>5,} B: {taken / EVENTS * TOLD / 1e6:>5,.0f} MB for {TOLD:,} events")


async def _fill(path: Path, size: int) -> None:
    log = await EmbeddedLog.open(path, owner=True)
    topic = TopicSpec(name="events", partitions=1, retention=None)
    await log.create([topic])
    for first in range(0, EVENTS, AT_ONCE):
        events = [_event(number, size) for number in range(first, first + AT_ONCE)]
        await asyncio.gather(
            *[
                log.append(topic.name, key=event_key(event), value=event.body, headers=encode_event(event))
                for event in events
            ]
        )
    await log.close()


def _event(number: int, size: int) -> Event:
    return Event(
        id=EventId(f"evt_{number:032x}"),
        source="github",
        type="push",
        key=None,
        received_at=1_800_000_000.0,
        headers=tuple((name.encode(), value.encode()) for name, value in HEADERS.items()),
        query="",
        body=os.urandom(size),
    )


if __name__ == "__main__":
    main()
