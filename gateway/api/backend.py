"""What the API works on: the log, the active rules, the index if this process keeps one, and the control records.

Nothing here may hold up the event loop, on which this process may deliver: what takes long is in threads that give way
to it (`aside`), or in steps.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

from gateway.api.cache import CacheByKey
from gateway.api.log_findings import LogReader
from gateway.api.overview import Overview, overview_of
from gateway.api.problems import ApiError, Code
from gateway.api.shares import FairTurns
from gateway.api.traffic_readings import TrafficReadings
from gateway.engine.control.state import Control
from gateway.engine.delivery.holds import Hold
from gateway.index.file import IndexBehindError, IndexUnavailableError
from gateway.index.index import Index
from gateway.log.base import Log
from gateway.log.topics import CONTROL_PARTITION, Topics
from gateway.model import LogUnavailableError, UnreadableRecordError
from gateway.ops.keyed_requests import Answers
from gateway.ops.rule_file_views import FileViews
from gateway.rules.rules import Rules
from gateway.settings import EmbeddedTarget, KafkaTarget, Role, Settings
from gateway.turns import taking_turns

T = TypeVar("T")
RECORDS_PER_STEP = 32
"""Records decoded before other tasks run: less than a millisecond."""
AT_A_TIME, EACH = 2, 1
"""Requests that may compute aside at a time, that may explain, and that may look through the log or the index; of the
former two, those of one principal."""
PATIENCE = 10.0
"""Seconds for which a request waits for its turn, and for the log."""
BEHIND_RETRY_AFTER = 1
"""Seconds after which what the index hasn't read yet may be asked for again: it reads the log as often."""


@dataclass(slots=True, kw_only=True)
class Backend:
    """One process's. `rules` and `index` are what they are at the moment; `index` is None while there is none open.

    `index_problem` is why. `holds` are those of the destinations that this process delivers to.
    `spool` is the state of its own, with that of each topic, None without one, `status` that of all
    that it has in memory, as `/status` has it. `process` is its name.
    `sees_members`: whether the log tells of the members that groups have in other processes. `are_rules_bare`: whether
    the rules were read without secrets. `public_url` is where senders reach the ingress, "" if that isn't known.
    """

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    rules_status: Callable[[], Mapping[str, Any]]
    index: Callable[[], Index | None] = lambda: None
    index_problem: Callable[[], str] = lambda: ""
    holds: Callable[[], Mapping[str, Hold]] = dict
    spool: Callable[[], Mapping[str, Any] | None] = lambda: None
    status: Callable[[], Mapping[str, Any]] = dict
    may_lack_topics: bool = False
    process: str = ""
    sees_members: bool = True
    are_rules_bare: bool = False
    public_url: str = ""
    giving: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    """Held while a command is given: the next one sees it, and what was answered to its key."""
    log_reader: LogReader = field(init=False, default_factory=LogReader)
    file_views: FileViews | None = field(init=False, default=None)
    """The rule files, as they were read last; `reading_files` is held while they are read."""
    reading_files: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    retrying: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    """Held while refused requests are verified again: one after another."""
    shared: CacheByKey[Any] = field(init=False, default_factory=CacheByKey)
    """What pages count for all who see the same."""
    traffic: TrafficReadings = field(init=False, default_factory=TrafficReadings)
    _looking: FairTurns = field(init=False, default_factory=lambda: FairTurns(AT_A_TIME))
    _computing: FairTurns = field(init=False, default_factory=lambda: FairTurns(AT_A_TIME, EACH))
    _explaining: FairTurns = field(init=False, default_factory=lambda: FairTurns(AT_A_TIME, EACH))
    _overview: tuple[object, Overview] | None = field(init=False, default=None)
    _looking_over: FairTurns = field(init=False, default_factory=lambda: FairTurns(1))
    _trying_out: FairTurns = field(init=False, default_factory=lambda: FairTurns(1))
    _control: Control = field(init=False, default_factory=Control)
    _answers: Answers = field(init=False, default_factory=Answers)
    _position: int = field(init=False, default=0)
    _last_at: float = field(init=False, default=0.0)
    _reading: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    def open_index(self) -> Index:
        """Return the index. Raises ApiError if this process has none open."""
        found = self.index()
        if found is None:
            why = self.index_problem() or "this process keeps none: `gateway run --role console` does, or `--index`"
            raise ApiError(Code.INDEX_UNAVAILABLE, f"the index isn't available: {why}")
        return found

    async def overview(self, rules: Rules) -> Overview:
        """Return what the active rules have, which is looked over once, for all who ask meanwhile.

        Raises ApiError if that takes too long.
        """
        key = (rules.version, self.rules_status()["loaded_at"])
        if self._overview is None or self._overview[0] != key:
            async with _turn(self._looking_over, ""):
                if self._overview is None or self._overview[0] != key:
                    self._overview = key, await _in_thread(lambda: overview_of(rules))
        return self._overview[1]

    @asynccontextmanager
    async def turn(self, who: str) -> AsyncIterator[None]:
        """Wait for a turn at looking through the log or the index. Raises ApiError if it takes too long.

        `who` asks, "" for all who see the same; nobody waits behind another's many. How many wait isn't bounded here:
        those who ask are, by the API and the console.
        """
        async with _turn(self._looking, who):
            yield

    async def aside(self, who: str, work: Callable[[], T]) -> T:
        """Do what computes for a moment in a thread, which gives way to the event loop where it calls `give_way`.

        Raises ApiError if others do so for too long.
        """
        async with _turn(self._computing, who):
            return await _in_thread(work)

    async def explain(self, who: str, work: Callable[[], T], seconds: float) -> T:
        """Do so with what may compute for seconds. Raises TooLongError, too, after so many of processor time."""
        async with _turn(self._explaining, who):
            return await _in_thread(work, seconds)

    async def try_out(self, who: str, work: Callable[[], T], seconds: float) -> T:
        """Do so with what somebody has made up: one at a time, so that nobody else waits for it."""
        async with _turn(self._trying_out, who):
            return await _in_thread(work, seconds)

    async def control(self) -> Control:
        """Return the state of the control records, with all that are stored by now. Raises LogUnavailableError."""
        async with self._reading:
            start, end = (await self.log.bounds(self.topics.control)).get(CONTROL_PARTITION, (0, 0))
            if end < self._position or (end > self._position and not await self._goes_on(start)):
                self._control, self._answers, self._position = Control(), Answers(), 0
            while end > self._position:
                await self._read_control(max(start, self._position), end)
                self._position = end
                # A record may have been compacted away for one behind the end that was known.
                _, end = (await self.log.bounds(self.topics.control)).get(CONTROL_PARTITION, (0, 0))
            return self._control

    async def answers(self) -> Answers:
        """Return what was answered to requests with a key. Raises LogUnavailableError."""
        await self.control()
        return self._answers

    async def _goes_on(self, start: int) -> bool:
        """Return whether the last record that was read is there, or compacted away; if not, it is another topic."""
        last = self._position - 1
        if last < start:
            return True
        async for records in self.log.scan(self.topics.control_partition, last, last + 1):
            for record in records:
                return record.appended_at == self._last_at
        return True

    async def _read_control(self, start: int, end: int) -> None:
        number = 0
        async for records in self.log.scan(self.topics.control_partition, start, end):
            for record in records:
                with suppress(UnreadableRecordError):  # the processes that act on it report it
                    self._control.decode_and_apply(record.key, record.value, record.offset, record.appended_at)
                self._answers.apply(record.key, record.value)
                self._last_at = record.appended_at
                number += 1
                if number % RECORDS_PER_STEP == 0:
                    await asyncio.sleep(0)


@asynccontextmanager
async def _turn(turns: FairTurns, who: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PATIENCE):
            await turns.acquire(who)
    except TimeoutError:
        raise ApiError(Code.BUSY, f"no turn within {PATIENCE:g} s: try again") from None
    try:
        yield
    finally:
        turns.release(who)


async def _in_thread(work: Callable[[], T], seconds: float = inf) -> T:
    loop = asyncio.get_running_loop()

    def run() -> T:
        with taking_turns(loop, seconds):
            return work()

    return await asyncio.to_thread(run)


def of_settings(settings: Settings) -> dict[str, Any]:
    """Return what settings say of a backend. The embedded log tells of the members of its own process alone."""
    return {
        "process": f"{socket.gethostname()}:{settings.admin.port}",
        "sees_members": settings.role.delivers or not isinstance(settings.log, EmbeddedTarget),
        "may_lack_topics": isinstance(settings.log, KafkaTarget),
        "are_rules_bare": settings.role is Role.CONSOLE,
        "public_url": settings.public_url,
    }


@asynccontextmanager
async def must_be_available(seconds: float | None = None) -> AsyncIterator[None]:
    """Turn what isn't available within `seconds` (None: `PATIENCE`) into a problem that says so."""
    patience = PATIENCE if seconds is None else seconds
    try:
        async with asyncio.timeout(patience):
            yield
    except LogUnavailableError as error:
        raise ApiError(Code.LOG_UNAVAILABLE, f"the log isn't available: {error}") from error
    except IndexBehindError as error:
        soon = {"Retry-After": str(BEHIND_RETRY_AFTER)}
        raise ApiError(Code.INDEX_UNAVAILABLE, f"the index is behind: {error}", headers=soon) from error
    except IndexUnavailableError as error:
        raise ApiError(Code.INDEX_UNAVAILABLE, f"the index isn't available: {error}") from error
    except TimeoutError:
        raise ApiError(Code.LOG_UNAVAILABLE, f"the log gave no answer within {patience:g} s") from None
