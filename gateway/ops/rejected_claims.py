"""A command's claim on a partition of `gateway.rejected`: while it lasts, no other works there (`claims.py`)."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing

from gateway.engine.jobs.log_reader import records_of
from gateway.log.base import Log, Partition, Position
from gateway.model import GatewayError, UnreadableRecordError
from gateway.quarantine.claims import LEASE, LOOK_BACK, MARGIN, Claims
from gateway.quarantine.records import Kind, Marker, RequestOutcome, decode, encode_marker

POLL_EVERY = 1.0
"""Seconds between looks at a partition that another command has."""
KEY = b"marker"


class ClaimLostError(GatewayError):
    """The claim has ended: appends took too long, and another command may have begun."""


class Claim:
    """A claim on one partition by the command `name`, given `by` somebody.

    `outcomes` are those of which it knows: all whose markers are at `start` or later.
    """

    def __init__(
        self,
        log: Log,
        partition: Partition,
        *,
        name: str,
        by: str,
        start: int,
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        self._log = log
        self._partition = partition
        self._name = name
        self._by = by
        self._next = start
        self._sleep = sleep
        self._claims = Claims()
        self._until = 0.0

    @property
    def outcomes(self) -> dict[int, RequestOutcome]:
        return self._claims.outcomes

    async def acquire(self, timeout: float) -> str:
        """Wait for the partition, for `timeout` seconds; return "" once it is ours, or else who has it."""
        waited = 0.0
        is_first = True
        while True:
            if is_first or self._claims.holder(self._log.now()) is None:
                position = await self._append(Kind.CLAIM)
                if is_first:  # only now the log's time is known, whatever this machine's clock says
                    await self._look_back(position.appended_at)
                    is_first = False
                await self._read(position.offset + 1)
                holder = self._claims.holder(position.appended_at)
                if holder is not None and holder[0] == self._name:
                    self._until = position.appended_at + LEASE
                    return ""
            if waited >= timeout:
                holder = self._claims.holder(self._log.now())
                return "another command" if holder is None else f"a command of {holder[1]}"
            await self._sleep(POLL_EVERY)
            waited += POLL_EVERY
            await self._read((await self._log.bounds(self._partition.topic))[self._partition.number][1])

    async def _look_back(self, at: float) -> None:
        """Have the markers read from so far before a time that any claim is known which lasts then."""
        topic, number = self._partition
        old = await self._log.offsets_at(topic, at - LOOK_BACK, [number])
        self._next = min(self._next, old.get(number, self._next))

    async def ensure(self) -> None:
        """Renew the claim if it ends soon. Raises ClaimLostError if it has ended."""
        if self._until - self._log.now() < LEASE - MARGIN:
            await self.store()

    def check(self) -> None:
        """Raise ClaimLostError unless an event may be appended now: its append ends before the claim does."""
        if self._until - self._log.now() < MARGIN:
            raise ClaimLostError(f"{self._partition.topic}/{self._partition.number}: the log is too slow")

    async def store(self, outcomes: Sequence[tuple[int, RequestOutcome]] = ()) -> None:
        """Store outcomes, and renew the claim. Raises ClaimLostError if it had ended; they are stored even then."""
        position = await self._append(Kind.DONE if outcomes else Kind.RENEW, outcomes)
        self._claims.outcomes.update(outcomes)
        if position.appended_at >= self._until:
            raise ClaimLostError(f"{self._partition.topic}/{self._partition.number}: the log was too slow")
        self._until = position.appended_at + LEASE

    async def end(self) -> None:
        """Let other commands work on the partition."""
        await self._append(Kind.END)

    async def _append(self, kind: Kind, outcomes: Sequence[tuple[int, RequestOutcome]] = ()) -> Position:
        marker = Marker(kind=kind, name=self._name, by=self._by, outcomes=tuple(outcomes))
        return await self._log.append(
            self._partition.topic, key=KEY, value=b"", headers=encode_marker(marker), partition=self._partition.number
        )

    async def _read(self, end: int) -> None:
        """Read the markers below an offset that weren't read yet."""
        async with aclosing(records_of(self._log, self._partition, self._next, end)) as records:
            async for record in records:
                try:
                    decoded = decode(record)
                except UnreadableRecordError:
                    continue  # whoever lists them reports it
                if isinstance(decoded, Marker):
                    self._claims.apply(decoded, record.appended_at)
        self._next = max(self._next, end)
