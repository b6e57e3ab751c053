"""`gateway replay --api`: the same, by the API of a process."""

import argparse
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.commands.base import Invocation
from gateway.commands.counting_replays import print_count, print_counts, print_event_count, suggest_end
from gateway.commands.events import NEITHER
from gateway.commands.remote import client_of
from gateway.commands.replaying import (
    check_asked,
    check_number,
    follow_replay,
    no_such_replay,
    not_matched,
    not_to_cancel,
    print_cancelled,
    print_nothing,
    print_stored,
    replay_forgotten,
)
from gateway.commands.stored_commands import StoredCommands, naming_stored, to_its_end
from gateway.engine.control.records import Selection
from gateway.model import UsageError
from gateway.ops.api_client import ApiClient, ApiRefusedError
from gateway.ops.api_commands import NOT_FOUND, ApiControl, ReplayStep, followed_replay, replays_under_way
from gateway.ops.api_replay_counts import counted, routes_of_event
from gateway.ops.control_client import CANCEL_GRACE
from gateway.ops.output import rfc3339
from gateway.ops.replay_counts import ReplayCount
from gateway.ops.replays import ReplayStatus


async def replay_by_api(call: Invocation) -> int:
    """Start, count, follow or cancel replays by the API."""
    arguments = call.arguments
    async with client_of(call) as client:
        if arguments.cancel is not None:
            return await _cancel(call, client, arguments.cancel)
        if arguments.follow is not None:
            return await _follow(call, client, arguments.follow)
        if arguments.event is not None:
            return await _replay_event(call, client)
        check_asked(arguments)
        return await _start(call, client)


async def _start(call: Invocation, client: ApiClient) -> int:
    arguments, output = call.arguments, call.output
    routes = await _routes(client, arguments)
    now = await client.now()
    since, until = arguments.since.on(now), None if arguments.until is None else arguments.until.on(now)
    if since >= (now if until is None else until):
        end = "now" if until is None else "--to"
        raise UsageError(f"--from: expected a time before {end}, got {rfc3339(since)}")
    selection = Selection(
        route="",
        destination=arguments.destination,
        source=arguments.source,
        since=since,
        until=until,
        rate=arguments.rate,
        undelivered=arguments.undelivered,
    )
    if arguments.dry_run:
        return await _count(call, client, [replace(selection, route=name) for name, _ in routes])
    control = ApiControl(client, arguments.why)
    with naming_stored(output) as stored:
        placed: list[str] = []
        for name, is_ordered in routes:
            given = await to_its_end(output, control.replay(replace(selection, route=name)))
            if given is not None:
                placed.append(given.command.name)
                stored.add_replay(placed[-1])
                if is_ordered:
                    output.note(f"route {name} is ordered, but a replay isn't")
        if placed:
            return max([await _await(call, client, name, stored) for name in placed])
    print_nothing(output)
    return 0


async def _count(call: Invocation, client: ApiClient, selections: Sequence[Selection]) -> int:
    """Print what replays would do, and the command for exactly that."""
    output, counts = call.output, list[ReplayCount]()
    for selection in selections:
        with output.waiting(f"counting what route {selection.route} would deliver"):
            told = await counted(client, selection)
        found = told.found
        if not selection.undelivered:
            suggest_end(output, selection.route, found.selection.since, selection.until, told.changed_at)
        print_count(output, found)
        if told.is_cut_short:
            output.note(f"only {found.looked:,} of {found.total:,} records were read in time: there may be more")
        counts.append(found)
    print_counts(call, counts)
    return 0


async def _replay_event(call: Invocation, client: ApiClient) -> int:
    """Deliver one event in the log again."""
    arguments, output = call.arguments, call.output
    try:
        found = await routes_of_event(client, arguments.event, route=arguments.route, destination=arguments.destination)
    except ApiRefusedError as error:
        if error.code == NOT_FOUND:
            output.fail(NEITHER.format(arguments.event))
            return 1
        raise
    if not found.routes:
        raise not_matched(arguments, found.event, found.matched)
    if arguments.dry_run:
        for name, destinations, _ in found.routes:
            print_event_count(output, found.event, name, destinations)
        return 0
    control = ApiControl(client, arguments.why)
    with naming_stored(output) as stored:
        placed: list[str] = []
        for name, _, _ in found.routes:
            given = await to_its_end(output, control.replay_event(found.position, name, arguments.destination))
            placed.append(given.command.name)
            stored.add_replay(placed[-1])
        return max([await _await(call, client, name, stored) for name in placed])


async def _routes(client: ApiClient, arguments: argparse.Namespace) -> Sequence[tuple[str, bool]]:
    """Return the routes to replay, the named one or all, and whether each is ordered."""
    if arguments.route is not None:
        found = await client.get("routes", arguments.route)
        return [(found["name"], found["order"] is not None)]
    if arguments.rate is not None:
        raise UsageError("--rate needs --route: it limits the replay of a single route")
    pages = client.pages("routes", source=arguments.source, destination=arguments.destination)
    routes = [(item["name"], item["order"] is not None) async for page in pages for item in page["items"]]
    check_number(routes)
    return routes


async def _await(call: Invocation, client: ApiClient, name: str, stored: StoredCommands) -> int:
    """Follow a replay that was just stored, unless `--no-wait`."""
    if call.arguments.wait:
        steps = followed_replay(client, name, timeout=call.arguments.timeout)
        code = await follow_replay(call, name, _progress(steps), stored)
        return replay_forgotten(call.output, name) if code is None else code
    async with aclosing(followed_replay(client, name, timeout=0.0)) as steps:
        async for step in steps:
            print_stored(call, step.progress)
            return 0
    return replay_forgotten(call.output, name)


async def _follow(call: Invocation, client: ApiClient, name: str) -> int:
    steps = followed_replay(client, name, timeout=call.arguments.timeout)
    with naming_stored(call.output) as stored:
        code = await follow_replay(call, name, _progress(steps), stored)
    if code is None:
        raise no_such_replay(name, await replays_under_way(client))
    return code


async def _progress(steps: AsyncGenerator[ReplayStep, None]) -> AsyncGenerator[ReplayStatus, None]:
    async with aclosing(steps):
        last = None
        async for step in steps:
            if step.progress != last:
                last = step.progress
                yield last


async def _cancel(call: Invocation, client: ApiClient, name: str) -> int:
    placed = await to_its_end(call.output, ApiControl(client, call.arguments.why).cancel(name))
    if placed is None:
        raise not_to_cancel(name)
    command, is_final = placed.command, False
    if call.arguments.wait:
        timeout = min(call.arguments.timeout, CANCEL_GRACE)
        with naming_stored(call.output) as stored, call.output.waiting("waiting for the replay to stop"):
            stored.add_cancellation(f"replay {name}")
            async with aclosing(followed_replay(client, name, timeout=timeout)) as steps:
                async for step in steps:
                    command, is_final = step.progress.command, step.is_final
    print_cancelled(call.output, command, is_final=is_final)
    return 0
