"""Go through many keys without keeping others from their turn."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 32
"""Deliveries with which something is begun before other tasks run: about a millisecond."""


async def in_batches(
    items: Iterable[T], sleep: Callable[[float], Awaitable[None]], *, each: int = AT_ONCE
) -> AsyncGenerator[T, None]:
    """Yield items, and let other tasks run after so many of them: whatever was known of the rest may have changed."""
    for count, item in enumerate(items, 1):
        yield item
        if count % each == 0:
            await sleep(0)
