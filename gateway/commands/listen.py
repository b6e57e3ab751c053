"""`gateway listen`: events as they come, and copies of them to a program under development."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from gateway.commands.base import Invocation, api_of, command, token_arguments, token_of
from gateway.commands.values import Parser
from gateway.listen.copies import Target, target_of
from gateway.listen.feed import Feed, Missed
from gateway.listen.listening import ITS_TURN, Forwarder, Listening, Shown
from gateway.listen.live_events import LiveEvents
from gateway.listen.presentation import fields_of, line_of, missed_text
from gateway.model import NAME_PATTERN, UsageError
from gateway.ops.api_client import ApiClient
from gateway.ops.live_display import LiveDisplay
from gateway.ops.live_list import State

DEFAULT = "http://127.0.0.1:9090"


def listen_arguments(parser: Parser) -> None:
    about = "which events, as `gateway events search` takes it, without times: 'type:push body.ref:refs/heads/main'"
    parser.add_argument("query", nargs="?", default="", metavar="QUERY", help=about)
    about = f"the process that tells them, one that keeps an index [env: GATEWAY_API, default: {DEFAULT}]"
    parser.add_argument("--api", metavar="URL", help=about)
    token_arguments(parser)
    about = "only of this source; repeatable"
    parser.add_argument("--source", action="append", default=[], metavar="SOURCE", help=about)
    about = "send a copy of each there, such as http://localhost:3000/hooks, with the headers and body of its provider"
    parser.add_argument("--forward", metavar="URL", help=about)
    about = "the host of --forward, if that isn't this machine"
    parser.add_argument("--allow-host", metavar="HOST", help=about)


@command(
    "listen",
    about="show events as they come, by the API of a process, and send copies of them to a program under development",
    example="gateway listen --api https://gateway.internal --source github --forward http://localhost:3000/hooks",
    add_arguments=listen_arguments,
)
async def _listen(call: Invocation) -> int:
    arguments = call.arguments
    target: Target | None = None
    if arguments.forward is not None:
        target = target_of(arguments.forward, allowed_host=arguments.allow_host)
    elif arguments.allow_host is not None:
        raise UsageError("--allow-host: expected --forward with a URL of that host, got none")
    query = _query(arguments.query, arguments.source)
    async with AsyncExitStack() as until_the_end:
        api = await until_the_end.enter_async_context(_client_of(call))
        forwarder = None if target is None else await until_the_end.enter_async_context(Forwarder(api, target))
        is_shown = sys.stdin.isatty() and sys.stdout.isatty() and not call.output.json
        work = _show_list if is_shown else _print_lines
        await _until_terminated(work(call, Feed(api, query), forwarder))
    return 0


def _query(query: str, sources: list[str]) -> str:
    """Return a query for the events of these sources alone, if there are any."""
    for source in sources:
        if not NAME_PATTERN.fullmatch(source):
            raise UsageError(f"--source: expected the name of a source, got {source!r}")
    return f"{query} source:{','.join(sources)}" if sources else query


def _client_of(call: Invocation) -> ApiClient:
    url = api_of(call) or DEFAULT
    return ApiClient(url, token_of(call), is_plain_allowed=call.arguments.plain_http)


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Do it until its end, or a SIGTERM."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.TaskGroup() as tasks:
            loop.add_signal_handler(signal.SIGTERM, tasks.create_task(work, name="listen").cancel)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def _print_lines(call: Invocation, feed: Feed, forwarder: Forwarder | None) -> None:
    """Print an event a line, once all is known that there is to say of it."""
    output = call.output

    async def show(each: Shown | State | Missed) -> None:
        match each:
            case Shown(waits_for="") if output.json:
                output.line(fields_of(each))
            case Shown(waits_for=""):
                output.print(line_of(each))
            case Shown(waits_for=why):
                if why != ITS_TURN:
                    output.note(f"{each.event.id} waits: {why}")
            case State(text):
                output.note(text or f"listening at {api_of(call) or DEFAULT}; Ctrl-C ends it")
            case Missed():
                output.note(missed_text(each))

    await Listening(feed, forwarder, show).run()


async def _show_list(_: Invocation, feed: Feed, forwarder: Forwarder | None) -> None:
    """Show a list until its user quits."""
    live = LiveEvents(forwarder)
    try:
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(Listening(feed, forwarder, live.show).run(), name="listen-events")
            await LiveDisplay(live.items(), live.resend).run()
            listening.cancel()
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
