"""Counts the records of a spool that aren't moved: when it is opened, and where some weren't counted."""

from gateway.spool.store import SpoolStore
from gateway.spool.topic_move import TopicMove
from gateway.spool.waiting import Waiting


async def count(store: SpoolStore, waiting: Waiting) -> None:
    """Count everything. Raises LogUnavailableError."""
    for topic in await store.topics():
        await count_topic(store, waiting, topic, await store.end(topic))


async def count_topic(store: SpoolStore, waiting: Waiting, topic: str, end: int, move: TopicMove | None = None) -> None:
    """Count what a topic has below an offset. `move` is what this process knows of it, by default what the file says.

    Raises LogUnavailableError.
    """
    dropped = await store.dropped(topic)
    waiting.set_dropped(topic, dropped)
    if move is None:
        move = TopicMove.after(topic, await store.moved(topic))
    start = max(move.base, dropped)
    while start < end:
        found, start, unreadable = await store.counted(topic, start, end)
        for each in found:
            if each.offset in move.aside:
                waiting.add_large(topic, each.size)
            elif move.waits(each.offset):
                waiting.add(topic, each.key, each.size, at=each.spooled_at)
        for lost in unreadable:
            for offset in range(lost.start, lost.end):
                if offset in move.aside:
                    waiting.add_large(topic, 0)
                elif move.waits(offset):
                    waiting.add(topic, b"", 0, at=store.now())
