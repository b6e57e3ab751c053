"""Counts what a spool has that isn't moved: when it is opened, and where something wasn't counted."""

from gateway.spool.store import SpoolStore
from gateway.spool.waiting import Waiting


async def count(store: SpoolStore, waiting: Waiting) -> None:
    """Count everything. Raises LogUnavailableError."""
    for topic in await store.topics():
        await count_topic(store, waiting, topic)


async def count_topic(store: SpoolStore, waiting: Waiting, topic: str) -> None:
    """Count what a topic has. Raises LogUnavailableError."""
    moved, end = await store.moved(topic), await store.end(topic)
    start = moved.base
    while start < end:
        found, start, unreadable = await store.counted(topic, start, end)
        for each in found:
            if not moved.covers(each.offset):
                waiting.add(topic, each.key, each.size, at=each.spooled_at)
        for lost in unreadable:
            for offset in range(lost.start, lost.end):
                if not moved.covers(offset):
                    waiting.add(topic, b"", 0, at=store.now())
