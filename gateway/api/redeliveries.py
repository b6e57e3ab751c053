"""Redeliveries of single events: those that are known, what has come of each, and their end before that."""

from gateway.access.principal import Principal
from gateway.api import command_shapes
from gateway.api.acts import SENT, Sent, command_of, once
from gateway.api.backend import Backend, must_be_available
from gateway.api.command_states import place_after, place_of, sees_command
from gateway.api.cursors import decode_cursor, encode_cursor
from gateway.api.problems import not_found
from gateway.engine.control.state import Control
from gateway.ops.audit import Actor
from gateway.ops.control_client import ControlClient
from gateway.ops.output import rfc3339
from gateway.ops.redeliveries import RedeliveryProgress, progress_of
from gateway.ops.redeliveries import cancel_redelivery as cancel
from gateway.ops.redeliveries import redeliveries as known_redeliveries

_LISTING = ("redeliveries",)


async def list_redeliveries(
    backend: Backend, principal: Principal, *, limit: int = 50, cursor: str | None = None
) -> command_shapes.RedeliveryPage:
    """List redeliveries of single events, the last that was asked for first."""
    after = None if cursor is None else place_after(decode_cursor(cursor, listing=_LISTING))
    async with must_be_available():
        control = await backend.control()
    items: list[command_shapes.Redelivery] = []
    last = (0, "")
    for command in sorted(known_redeliveries(control), key=place_of, reverse=True):
        if (after is not None and place_of(command) >= after) or not sees_command(backend, principal, command):
            continue
        if len(items) == limit:
            following = encode_cursor({"at": last[0], "name": last[1]}, listing=_LISTING)
            return command_shapes.RedeliveryPage(items=tuple(items), next_cursor=following)
        if (progress := progress_of(control, command.name)) is not None:
            items.append(_redelivery(progress))
            last = place_of(command)
    return command_shapes.RedeliveryPage(items=tuple(items), next_cursor=None)


async def get_redelivery(backend: Backend, principal: Principal, *, redelivery: str) -> command_shapes.Redelivery:
    """Return a redelivery of a single event, with what has come of it."""
    async with must_be_available():
        control = await backend.control()
    progress = progress_of(control, redelivery)
    if (
        progress is None
        or progress.command.redelivery is None
        or not sees_command(backend, principal, progress.command)
    ):
        raise not_found("a redelivery")
    return _redelivery(progress)


async def cancel_redelivery(
    backend: Backend, principal: Principal, *, redelivery: str, given: command_shapes.Act, sent: Sent = SENT
) -> command_shapes.Command:
    """Cancel a redelivery of a single event: what it has queued by then is delivered."""

    async def give(_: ControlClient, control: Control, __: str) -> command_shapes.Command:
        before = control.commands.get(f"redeliver/{redelivery}")
        if before is None or not sees_command(backend, principal, before):
            raise not_found("a redelivery")
        cancelled = await cancel(
            backend.log,
            backend.topics,
            control,
            redelivery,
            actor=Actor.of(principal, sent.origin),
            reason=given.reason or "",
        )
        return command_of(before, is_new=False) if cancelled is None else command_of(cancelled)

    return await once(backend, principal, sent, ("cancel redelivery", redelivery, given), give, why=given.reason)


def _redelivery(progress: RedeliveryProgress) -> command_shapes.Redelivery:
    command, asked = progress.command, progress.command.redelivery
    assert asked is not None, command
    return command_shapes.Redelivery(
        id=command.name,
        at=rfc3339(command.at),
        by=command.by or None,
        reason=asked.reason or None,
        event=asked.event,
        position=asked.position,
        route=asked.route,
        destination=asked.destination,
        state=command.state,
        is_final=progress.is_final,
        detail=command.detail or None,
        deliveries=tuple(
            [
                command_shapes.RedeliveredTo(
                    route=each.route,
                    destination=each.destination or None,
                    outcome=each.outcome,
                    paused_by=each.paused_by or None,
                )
                for each in progress.results
            ]
        ),
    )
