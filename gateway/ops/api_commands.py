"""Commands by the API of a process: given, and followed; the log has them by `ControlClient` and others."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult
from gateway.ops.api_answers import Answer, time_of
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.control_client import CANCEL_GRACE, POLL_EVERY, Pause, StoredCommand
from gateway.ops.ordered_backlog import NOT_KNOWN, UNTOLD, OrderedOutcome
from gateway.ops.output import rfc3339
from gateway.ops.redeliveries import RedeliveryProgress
from gateway.ops.replays import ReplayStatus

if TYPE_CHECKING:
    from gateway.engine.control.records import Kind, State

P = TypeVar("P")
POLL = 5 * POLL_EVERY
"""Seconds between questions what has come of a command."""
ORDERED_WITHIN = 5.0
"""Seconds after the end of a kick for which is asked what it came to on ordered routes."""
NOT_FOUND, NOTHING_TO_DO = "not_found", "nothing_to_do"


class ApiControl:
    """Gives commands, each for one reason; its methods are those of a `ControlClient`."""

    def __init__(self, client: ApiClient, why: str) -> None:
        self._client = client
        self._body: Mapping[str, object] = {"reason": why} if why else {}

    async def pause(self, name: str) -> Pause:
        """Stop the deliveries of "route/…" or "destination/…"."""
        answer = await self._give(name, "pause")
        return Pause(_command(answer), is_new=answer["is_new"], offset=None)

    async def confirmed(self, pause: Pause, *, timeout: float) -> ControlRecord | None:
        """Return what applies to a paused name once a running gateway has read it; None if none has in time."""
        async with aclosing(self._states(pause.command, timeout)) as states:
            async for state in states:
                if state["is_read"]:
                    return _command(state)
        return None

    async def resume(self, name: str) -> StoredCommand | None:
        """Resume a paused name; None if there is nothing to do."""
        answer = await self._give(name, "resume")
        return StoredCommand(_command(answer), 0) if answer["is_new"] else None

    async def kick(self, name: str) -> StoredCommand:
        """Have everything that waits for a retry retried now."""
        return StoredCommand(_command(await self._give(name, "kick")), 0)

    async def resolve(self, action: Literal["replay", "drop"], which: DeadFilter) -> StoredCommand:
        """Have the dead letters that exist now and match the filter replayed or dropped."""
        body: dict[str, object] = {
            "ids": which.ids,
            "route": which.route,
            "destination": which.destination,
            "dead_reason": which.reason,
            "since": _time(which.since),
            "until": _time(which.until),
        }
        given: dict[str, object] = {name: value for name, value in body.items() if value} or {"all": True}
        return StoredCommand(
            _command(await self._client.command("dead-letters", action, body={**self._body, **given})), 0
        )

    async def replay(self, asked: Selection) -> StoredCommand | None:
        """Have a selection's events delivered again; None if there are none."""
        body: dict[str, object] = {
            "route": asked.route,
            "since": rfc3339(asked.since),
            "until": _time(asked.until),
            "destination": asked.destination,
            "source": asked.source,
            "rate": asked.rate,
            "undelivered": asked.undelivered,
        }
        try:
            answer = await self._client.command("replays", body={**self._body, **body})
        except ApiRefusedError as error:
            if error.code == NOTHING_TO_DO:
                return None
            raise
        return StoredCommand(_command(answer), 0)

    async def replay_event(self, position: str, route: str, destination: str | None) -> StoredCommand:
        """Have one event delivered again by a route, to all its destinations or one."""
        body: dict[str, object] = {"route": route, "destination": destination, "event": position}
        return StoredCommand(_command(await self._client.command("replays", body={**self._body, **body})), 0)

    async def cancel(self, name: str) -> StoredCommand | None:
        """Cancel a replay; None if there is no such replay, or it has ended."""
        try:
            answer = await self._client.command("replays", name, "cancel", body=self._body)
        except ApiRefusedError as error:
            if error.code == NOT_FOUND:
                return None
            raise
        return StoredCommand(_command(answer), 0) if answer["is_new"] else None

    async def finished(self, placed: StoredCommand, *, timeout: float) -> ControlRecord | None:
        """Return a command with its outcome; None if it hasn't ended in time.

        A pause of its name cancels it. A newer one like it doesn't: what comes of that is the outcome of both.
        """
        async with aclosing(self._states(placed.command, timeout)) as states:
            async for answer in states:
                state = _command(answer)
                if state.state in ("done", "active"):
                    return state
                if _is_paused_after(state, placed):
                    return placed.command.with_state("cancelled", count=await self._count_until_paused(placed))
        return None

    async def _count_until_paused(self, placed: StoredCommand) -> int:
        """Return how far a resume had come that was cut by a pause, once a gateway has had the time to say so."""
        count = 0
        async with aclosing(self._states(placed.command, CANCEL_GRACE)) as states:
            async for answer in states:
                state = _command(answer)
                if not _is_paused_after(state, placed):
                    break
                count = max(count, state.count)
        return count

    async def ordered_outcome(self, placed: StoredCommand) -> OrderedOutcome:
        """Return what a kick that has ended came to on ordered routes, once that is known or some seconds passed."""
        outcome = OrderedOutcome()
        async with aclosing(self._states(placed.command, ORDERED_WITHIN)) as states:
            async for answer in states:
                outcome = _ordered(answer, placed.command)
                if outcome.note != NOT_KNOWN:
                    break
        return outcome

    async def has_begun(self, placed: StoredCommand) -> bool:
        """Return whether a gateway has read a command, and so begins to carry it out."""
        return bool((await self._client.get("commands", placed.command.key))["is_read"])

    async def _states(self, command: ControlRecord, timeout: float) -> AsyncGenerator[Answer, None]:
        """Yield what has come of a command by now, again and again for so long: also if the API is away meanwhile."""
        waited = 0.0
        while True:
            try:
                state = await self._client.get("commands", command.key)
            except ApiUnavailableError:
                if waited >= timeout:
                    raise
            else:
                yield state
            if waited >= timeout:
                return
            await asyncio.sleep(POLL)
            waited += POLL

    async def _give(self, name: str, action: str) -> Mapping[str, Any]:
        kind, _, called = name.partition("/")
        return await self._client.command(f"{kind}s", called, action, body=self._body)


def _is_paused_after(state: ControlRecord, placed: StoredCommand) -> bool:
    """Return whether a name was paused after a command: one who knows less may still tell of a pause before it."""
    return state.state == "paused" and state.at >= placed.command.at


def _command(answer: Answer) -> ControlRecord:
    """Return a command, or what has come of it, as the log has it."""
    kind, _, name = answer["id"].partition("/")
    return ControlRecord(
        kind=cast("Kind", kind),
        name=name,
        state=cast("State", answer["state"]),
        at=time_of(answer["at"]),
        by=answer["by"] or "",
        count=answer.get("count", 0),
        tried=answer.get("tried"),
        delivered=answer.get("delivered"),
        untried_by_reason=answer.get("waiting", {}),
        failed_by_result=answer.get("failed_by_result", {}),
        dead=answer.get("dead", 0),
        unread=answer.get("unread_partitions", 0),
        detail=answer.get("detail") or "",
    )


def _ordered(answer: Answer, command: ControlRecord) -> OrderedOutcome:
    """Return what came of a kick on ordered routes: not known, if another has come since, or the API doesn't say."""
    told = answer.get("ordered", {"is_known": False})
    if told is None:
        return OrderedOutcome()
    if not told["is_known"] or _command(answer).at != command.at:
        return OrderedOutcome(note=NOT_KNOWN)
    if not told["count"]:
        return OrderedOutcome(note=UNTOLD)
    kick = command.with_state(
        "done",
        count=told["count"],
        tried=told["tried"],
        delivered=told["delivered"],
        untried_by_reason=told["waiting"],
        failed_by_result=told["failed_by_result"],
        repeated_failures=told["repeated_failures"],
        dead=told["dead"],
    )
    return OrderedOutcome(waited=told["count"], wait=told["unfinished"], kick=kick)


def _time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)


class ApiRedeliveries:
    """Redeliveries of single events by the API."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def ask(self, event: str, *, route: str | None, destination: str | None, why: str) -> str | None:
        """Have an event delivered again, and return the redelivery's id; None if there is no such event."""
        body: dict[str, object] = {"route": route, "destination": destination, "reason": why or None}
        try:
            answer = await self._client.command("events", event, "redeliver", body=body)
        except ApiRefusedError as error:
            if error.code == NOT_FOUND:
                return None
            raise
        name: str = answer["id"].partition("/")[2]
        return name

    async def followed(self, name: str, *, timeout: float) -> AsyncGenerator[RedeliveryProgress, None]:
        """Yield a redelivery's progress, now and at each change, until it is final; nothing if there is none."""

        def limit(progress: RedeliveryProgress) -> float:
            if progress.is_final:
                return 0.0
            return min(timeout, CANCEL_GRACE) if progress.command.state == "cancelled" else timeout

        async with aclosing(_followed(lambda: self._progress(name), limit)) as steps:
            async for step in steps:
                yield step

    async def cancel(self, name: str, why: str) -> bool:
        """Cancel a redelivery; return whether there is one of that name that hasn't ended."""
        try:
            answer = await self._client.command(
                "redeliveries", name, "cancel", body={"reason": why} if why else dict[str, object]()
            )
        except ApiRefusedError as error:
            if error.code == NOT_FOUND:
                return False
            raise
        return bool(answer["is_new"])

    async def known(self) -> Sequence[RedeliveryProgress]:
        """Return the redeliveries that are remembered, the last that was asked for first."""
        return [_redelivery(item) async for page in self._client.pages("redeliveries") for item in page["items"]]

    async def _progress(self, name: str) -> RedeliveryProgress | None:
        answer = await _known(self._client, "redeliveries", name)
        return None if answer is None else _redelivery(answer)


def _redelivery(item: Answer) -> RedeliveryProgress:
    partition, _, offset = item["position"].rpartition("@")
    asked = Redelivery(
        event=item["event"],
        partition=partition,
        offset=int(offset),
        route=item["route"],
        destination=item["destination"],
        reason=item["reason"] or "",
    )
    command = ControlRecord(
        kind="redeliver",
        name=item["id"],
        state=cast("State", item["state"]),
        at=time_of(item["at"]),
        by=item["by"] or "",
        redelivery=asked,
        detail=item["detail"] or "",
    )
    results = [
        RedeliveryResult(
            route=each["route"],
            destination=each["destination"] or "",
            outcome="dead" if each["outcome"] == "dead" else "queued",
            paused_by=each["paused_by"] or "",
        )
        for each in item["deliveries"]
    ]
    return RedeliveryProgress(command, tuple(results), item["is_final"])


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """How far a replay is; `is_final` once there is nothing more to come."""

    progress: ReplayStatus
    is_final: bool


async def followed_replay(client: ApiClient, name: str, *, timeout: float) -> AsyncGenerator[ReplayStep, None]:
    """Yield how far a replay is, now and at each change, until its end; nothing if there is no such replay.

    Ends early if nothing changes for `timeout` seconds.
    """

    def limit(step: ReplayStep) -> float:
        if step.is_final:
            return 0.0
        return CANCEL_GRACE if step.progress.has_ended else timeout

    async def ask() -> ReplayStep | None:
        answer = await _known(client, "replays", name)
        return None if answer is None else ReplayStep(_replay(answer), answer["is_final"])

    async with aclosing(_followed(ask, limit)) as steps:
        async for step in steps:
            yield step


async def _known(client: ApiClient, *path: str) -> Answer | None:
    """Return what is at a path, None if there is nothing."""
    try:
        return await client.get(*path)
    except ApiRefusedError as error:
        if error.code == NOT_FOUND:
            return None
        raise


async def _followed(ask: Callable[[], Awaitable[P | None]], limit: Callable[[P], float]) -> AsyncGenerator[P, None]:
    """Yield what is answered, at each change, until nothing has changed for so long; nothing if there is nothing.

    An API that is away for less than that is asked again.
    """
    last: P | None = None
    waited = 0.0
    while True:
        try:
            now = await ask()
        except ApiUnavailableError:
            if last is None or waited >= limit(last):
                raise
        else:
            if now is None:
                return
            if now != last:
                last, waited = now, 0.0
                yield now
        if last is None or waited >= limit(last):
            return
        await asyncio.sleep(POLL)
        waited += POLL


async def replays_under_way(client: ApiClient) -> Sequence[str]:
    """Return the ids of the replays that haven't ended."""
    found = [item async for page in client.pages("replays") for item in page["items"]]
    return [str(item["id"]) for item in found if item["state"] == "requested"]


def _replay(item: Answer) -> ReplayStatus:
    selection = Selection(
        route=item["route"],
        destination=item["destination"],
        source=item["source"],
        since=time_of(item["since"]),
        until=None if item["until"] is None else time_of(item["until"]),
        rate=item["rate"],
        undelivered=item["undelivered"],
    )
    command = ControlRecord(
        kind="replay",
        name=item["id"],
        state=cast("State", item["state"]),
        at=time_of(item["at"]),
        selection=selection,
        count=item["queued"],
        unread=item["unread_partitions"] if item["state"] == "done" else 0,
        detail=item["detail"] or "",
    )
    return ReplayStatus(command, item["scanned"], item["total"], item["queued"], item["unread_partitions"])
