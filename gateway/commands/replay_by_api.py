"""`gateway replay --api`: the same, by the API of a process."""

import argparse
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from gateway.commands.base import Invocation
from gateway.commands.remote import client_of
from gateway.commands.replaying import (
    check_asked,
    check_number,
    follow_replay,
    no_such_replay,
    not_to_cancel,
    print_cancelled,
    print_nothing,
    print_stored,
)
from gateway.engine.control.records import Selection
from gateway.model import UsageError
from gateway.ops.api_client import ApiClient, ApiUnavailableError
from gateway.ops.api_orders import ApiControl, ReplayStep, followed_replay, replays_under_way
from gateway.ops.control_client import CANCEL_GRACE
from gateway.ops.output import rfc3339
from gateway.ops.replays import ReplayStatus

INSTEAD = {
    "--event": "`gateway events redeliver` delivers one event again",
    "--dry-run": "the API doesn't count what a replay would deliver, which reads all events of its time",
}


async def replay_by_api(call: Invocation) -> int:
    """Start, follow or cancel replays by the API."""
    arguments = call.arguments
    for flag, given in (("--event", arguments.event is not None), ("--dry-run", arguments.dry_run)):
        if given:
            raise UsageError(f"replay: expected no {flag} with --api: {INSTEAD[flag]}")
    async with client_of(call) as client:
        if arguments.cancel is not None:
            return await _cancel(call, client, arguments.cancel)
        if arguments.follow is not None:
            return await _follow(call, client, arguments.follow)
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
    orders = ApiControl(client, arguments.why)
    placed = []
    for name, is_ordered in routes:
        selection = Selection(
            route=name,
            destination=arguments.destination,
            source=arguments.source,
            since=since,
            until=until,
            rate=arguments.rate,
            undelivered=arguments.undelivered,
        )
        stored = await orders.replay(selection)
        if stored is not None:
            placed.append(stored.command.name)
            if is_ordered:
                output.note(f"route {name} is ordered, but a replay isn't")
    if not placed:
        print_nothing(output)
        return 0
    return max([await _await(call, client, name) for name in placed])


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


async def _await(call: Invocation, client: ApiClient, name: str) -> int:
    """Follow a replay that was just stored, unless `--no-wait`."""
    if call.arguments.wait:
        return await _follow(call, client, name)
    async with aclosing(followed_replay(client, name, timeout=0.0)) as steps:
        async for step in steps:
            print_stored(call, step.progress)
            break
    return 0


async def _follow(call: Invocation, client: ApiClient, name: str) -> int:
    steps = followed_replay(client, name, timeout=call.arguments.timeout)
    try:
        code = await follow_replay(call, name, _progress(steps))
    except ApiUnavailableError as error:
        told = f"{error}; the replay goes on by itself, and --follow {name} shows its progress"
        raise ApiUnavailableError(told) from error
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
    placed = await ApiControl(client, call.arguments.why).cancel(name)
    if placed is None:
        raise not_to_cancel(name)
    command, is_final = placed.command, False
    if call.arguments.wait:
        timeout = min(call.arguments.timeout, CANCEL_GRACE)
        with call.output.waiting("waiting for the replay to stop"):
            async with aclosing(followed_replay(client, name, timeout=timeout)) as steps:
                async for step in steps:
                    command, is_final = step.progress.command, step.is_final
    print_cancelled(call.output, command, is_final=is_final)
    return 0
