"""The destinations of a simulation, and the client through which a process reaches them."""

import asyncio
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Protocol

from gateway.client.request import Outbound
from gateway.model import Attempt, Result
from tests.simulation.broker import Machine, SimulatedLog
from tests.simulation.ledger import Ledger

HEALTHY: Mapping[str, Any] = {"kind": "healthy"}


class Caller(Protocol):
    """The process that makes an attempt."""

    name: str
    is_dead: bool
    log: SimulatedLog

    @property
    def machine(self) -> Machine:
        """Whose clock stamps the attempts, as the real client's does."""


class Sink:
    """A destination. `how` is how it behaves now."""

    def __init__(self, name: str, latency: float, random: Random) -> None:
        self.name = name
        self.how = HEALTHY
        self._latency = latency
        self._random = random

    async def answer(self, timeout: float) -> tuple[Result, int | None, float | None]:
        """Return result, status and Retry-After, within the timeout."""
        how, latency = self.how, self._latency * self._random.uniform(0.5, 1.5)
        kind, retry_after = how["kind"], how.get("retry_after")
        if kind in _SILENT:
            result, seconds = _SILENT[kind]
            await asyncio.sleep(min(timeout, seconds))
            return result, None, None
        if kind == "hang":
            latency = timeout
        elif kind == "slow":
            latency = how["latency"] * self._random.uniform(0.5, 1.5)
        is_up = kind != "flap" or int(asyncio.get_running_loop().time() / how["period"]) % 2
        status = how["status"] if kind == "error" else _STATUSES.get(kind, 200 if is_up else 500)
        await asyncio.sleep(min(latency, timeout))
        if latency >= timeout:
            return Result.TIMEOUT, None, None
        return Result.THROTTLED if status == 429 else _RESULTS[status // 100], status, retry_after


_SILENT = {"refuse": (Result.CONNECT, 0.001), "dns": (Result.DNS, 1.0)}
_STATUSES = {"throttle": 429, "gone": 410, "missing": 404}
_RESULTS = {2: Result.SUCCESS, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}


class SimulatedClient:
    """What makes the attempts of one process: it dies with it."""

    def __init__(self, caller: Caller, sinks: Callable[[str], Sink], ledger: Ledger) -> None:
        self._caller = caller
        self._sinks = sinks
        self._ledger = ledger

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int, **_: object) -> Attempt:
        if self._caller.is_dead:
            raise asyncio.CancelledError
        name = outbound.url.rpartition("/")[2]
        is_timed = self._caller.log.clock.is_known or not self._caller.log.is_timeless
        made = self._ledger.begin(self._caller.name, name, outbound, number, is_timed=is_timed)
        loop = asyncio.get_running_loop()
        at, began = self._caller.machine.now(), loop.time()
        try:
            result, status, retry_after = await self._sinks(name).answer(timeout)
        except asyncio.CancelledError:
            if not self._caller.is_dead:
                cut = Attempt(number=number, at=at, seconds=loop.time() - began, result=Result.TIMEOUT)
                made.is_cut = True
                self._ledger.end(made, cut)
            raise
        if self._caller.is_dead:
            raise asyncio.CancelledError
        attempt = Attempt(
            number=number, at=at, seconds=loop.time() - began, result=result, status=status, retry_after=retry_after
        )
        self._ledger.end(made, attempt)
        return attempt
