"""What operators order, written to `gateway.control`, and how it is known that an order was carried out.

pause, cancel     are in force as soon as they are stored
resume, kick, replay, drop     are done by the running gateway that owns the jobs, which then publishes the end
"""

import asyncio
import getpass
import math
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Literal, NamedTuple

from gateway.engine.control.records import DeadFilter, Kind, Order, Selection, State, decode
from gateway.engine.control.state import Control
from gateway.log.base import Log, Partition, Record
from gateway.log.topics import Topics
from gateway.model import UnreadableRecordError

LAST_WORD = 3.0
"""Seconds within which a gateway tells how far it had come with what is taken back."""
_DONE: Mapping[Kind, State] = {"pause": "active"}
POLL_EVERY = 0.1
"""Seconds between looks at whether an order was carried out."""


class StoredCommand(NamedTuple):
    """An order that is stored, and its offset in the control topic."""

    order: Order
    offset: int


class Pause(NamedTuple):
    """The pause in force, and whether it was given just now."""

    order: Order
    is_new: bool


class ControlClient:
    """The orders of one log. Every method may raise LogUnavailableError."""

    def __init__(
        self, log: Log, topics: Topics, *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self._log = log
        self._topics = topics
        self._partition = Partition(topics.control, 0)
        self._sleep = sleep

    async def control(self) -> Control:
        """Return the orders in force now; one that can't be read isn't."""
        start, end = (await self._log.bounds(self._topics.control)).get(0, (0, 0))
        control = Control()
        async for records in self._log.scan(self._partition, start, end):
            for record in records:
                with suppress(UnreadableRecordError):  # The running gateway reports it.
                    control.take(record.key, record.value, record.offset)
        return control

    async def pause(self, name: str) -> Pause:
        """Stop the deliveries of "route/…" or "destination/…"; they are parked until it is resumed.

        What is paused already stays as its first pause says: nothing is stored. Of two that come at the same moment,
        where neither sees the other's, the later counts.
        """
        control = await self.control()
        order = Order(kind="pause", name=name, state="paused", at=self._log.now(), by=who())
        before = control.orders.get(order.key)
        if before is not None and before.state == "paused" and order.key not in control.newer:
            return Pause(before, is_new=False)
        await self._place(order)
        return Pause(order, is_new=True)

    async def resume(self, name: str) -> StoredCommand | None:
        """Let a paused name go on, and have what was parked delivered. None if it isn't paused."""
        order = Order(kind="pause", name=name, state="resuming", at=self._log.now(), by=who())
        before = (await self.control()).orders.get(order.key)
        return None if before is None or before.state == "active" else await self._place(order)

    async def kick(self, name: str) -> StoredCommand:
        """Have everything that waits for a retry tried now."""
        return await self._place(Order(kind="kick", name=name, state="asked", at=self._log.now()))

    async def settle(self, action: Literal["replay", "drop"], which: DeadFilter) -> StoredCommand:
        """Have the dead letters there are now, and that the filter covers, replayed or dropped."""
        ends, unread = await self._log.readable(self._topics.dead)
        return await self._place(
            Order(
                kind="dead",
                name=self._new_name(),
                state="asked",
                at=self._log.now(),
                marker={f"{self._topics.dead}/{number}": end for number, (_, end) in ends.items()},
                action=action,
                filter=which,
                unread=len(unread),
            )
        )

    async def replay(self, selection: Selection, ends: Mapping[str, int], *, unread: int = 0) -> StoredCommand:
        """Have the events of a selection delivered again, those below these ends ("topic/partition" → offset).

        So many partitions more can't be read, and aren't among them.
        """
        return await self._place(
            Order(
                kind="replay",
                name=self._new_name(),
                state="asked",
                at=self._log.now(),
                marker=ends,
                selection=selection,
                unread=unread,
            )
        )

    async def cancel(self, name: str) -> StoredCommand | None:
        """End a replay; what is just being injected still is. None if there is no such replay, or it has ended."""
        control = await self.control()
        order = control.orders.get(f"replay/{name}")
        if order is None or order.state != "asked":
            return None
        cancelled = order.with_state("cancelled", count=control.injected(order.key))
        return await self._place(cancelled)

    async def finished(self, placed: StoredCommand, *, timeout: float) -> Order | None:
        """Return the order as it was carried out, or None when nobody has within `timeout` seconds.

        It is "cancelled" where a newer one of its name has taken it back, and `count` is what was done of it by then.
        """
        start = placed.offset + 1
        waited, taken_back_at = 0.0, math.inf
        while True:
            end = (await self._log.bounds(self._topics.control)).get(0, (0, 0))[1]
            async for records in self._log.scan(self._partition, start, end):
                for record in records:
                    order = _of_same(record, placed.order)
                    if order is None:
                        continue
                    if (ended := _ending(order, placed)) is not None:
                        return ended
                    if order.state == "paused":
                        taken_back_at = min(taken_back_at, waited)
            start = max(start, end)
            if waited >= taken_back_at + LAST_WORD:  # before anybody had begun
                return placed.order.with_state("cancelled", count=0)
            if waited >= timeout:
                return None
            await self._sleep(POLL_EVERY)
            waited += POLL_EVERY

    def _new_name(self) -> str:
        return f"{int(self._log.now() * 1000):x}-{secrets.token_hex(4)}"

    async def _place(self, order: Order) -> StoredCommand:
        key, value = order.encode()
        position = await self._log.append(self._topics.control, key=key, value=value, headers=[])
        return StoredCommand(order, position.offset)


def who() -> str:
    """Return who gives an order, as far as this machine knows: "user@host"."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _of_same(record: Record, placed: Order) -> Order | None:
    """Read a record of the control topic, if it is one of the order's key or of its marker's."""
    if record.key not in (placed.key.encode(), f"marker/{placed.key}".encode()):
        return None
    try:
        return decode(record.key, record.value)
    except UnreadableRecordError:
        return None


def _ending(order: Order, placed: StoredCommand) -> Order | None:
    """Return how an order has ended: by the marker that answers it, or by an end of its own."""
    if order.kind == "marker":
        if order.state not in ("done", "cancelled") or order.answers <= placed.offset:
            return None
        state = order.state if order.state == "cancelled" else _DONE.get(placed.order.kind, "done")
        return placed.order.with_state(
            state,
            count=order.count,
            detail=order.detail,
            tried=order.tried,
            delivered=order.delivered,
            waits=order.waits,
            got=order.got,
            again=order.again,
            rate=order.rate,
            unread=order.unread,
        )
    # `at` tells it from the end of an order before this one under the same name.
    return order if order.state in ("done", "active") and order.at == placed.order.at else None
