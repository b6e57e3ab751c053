"""`gateway events export`: events as files that `gateway test` and `gateway diff` read."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    opened_log,
    rules_without_secrets,
)
from gateway.commands.events import event_topics_of, query_of
from gateway.commands.values import Parser, duration, positive
from gateway.index.query import parse_query
from gateway.index.reading import index_to_read
from gateway.log.base import Log
from gateway.log.records import decode_event
from gateway.model import UnreadableRecordError, UsageError
from gateway.ops.event_export import LINES, TESTS, TOO_SHORT, Export
from gateway.ops.log_search import Found, find_event, newest_first
from gateway.ops.output import Output, count


def export_arguments(parser: Parser) -> None:
    about = "events from the search index, as for `gateway events search`; without it, the newest in the log"
    parser.add_argument("query", metavar="QUERY", nargs="?", help=about)
    about = f"a folder, which gets a file for each event and {TESTS}; or FILE{LINES}, which gets a line for each"
    parser.add_argument("--to", required=True, type=Path, metavar="PATH", help=about)
    parser.add_argument("--source", metavar="SOURCE", help="without QUERY: only events of this source")
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only those stored in the last DURATION (such as 1h)"
    )
    parser.add_argument(
        "--limit", type=positive, default=100, metavar="N", help="export the newest N at most (default: 100)"
    )
    api_arguments(parser)


@command(
    "events export",
    about="write events as files that `gateway test` and `gateway diff` read, without signatures and credentials",
    example="gateway events export 'status:dead route:build since:1d' --to tests/events",
    add_arguments=export_arguments,
    settings=("rules", "index", *LOG_SETTINGS),
)
async def _events_export(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    if arguments.query is not None and arguments.source is not None:
        raise UsageError("events export: expected --source, or a QUERY with source:NAME in it, got both")
    if api_of(call) is not None:
        return await _export_by_api(call)
    topics = event_topics_of(call, arguments.source)
    rules = rules_without_secrets(call.settings.rules)
    async with opened_log(call) as log:
        export = Export(arguments.to)
        try:
            with output.waiting("exporting"):
                async with aclosing(_events(call, log, topics)) as events:
                    async for found in events:
                        export.add(found, rules)
                        if export.written == arguments.limit:
                            break
        finally:
            export.close()
    _print_end(output, export, arguments.to, arguments.limit)
    return 0


async def _export_by_api(call: Invocation) -> int:
    """Do the same by the API of a process, which withholds by its own rules what isn't to be in a file."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import exported_of, searched  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_client import ApiRefusedError  # noqa: PLC0415 - a tenth of a second

    arguments, output = call.arguments, call.output
    query = arguments.query or ("" if arguments.source is None else f"source:{arguments.source}")
    async with client_of(call) as client:
        export = Export(arguments.to)
        try:
            with output.waiting("exporting"):
                async for event, _ in searched(client, query_of(query, arguments.since), arguments.limit):
                    if event is None or not event.position:
                        continue
                    try:
                        found = await client.get("events", event.position, "exported")
                    except ApiRefusedError as error:
                        if error.code == "conflict":
                            export.left_out[TOO_SHORT] += 1
                        elif error.code == "not_found":
                            output.note(f"{event.id}, {event.position}: {GONE}", style="yellow")
                        else:
                            raise
                        continue
                    export.add_exported(exported_of(found))
        finally:
            export.close()
    _print_end(output, export, arguments.to, arguments.limit)
    return 0


GONE = "the index has it there, and the log hasn't any more, or the rules lack its source"


def _print_end(output: Output, export: Export, to: Path, limit: int) -> None:
    for why, number in export.left_out.items():
        output.note(f"left out: {count(number, 'event')} that {why}", style="yellow")
    for name, number in sorted(export.withheld.items()):
        output.note(f"withheld of {count(number, 'event')}: {name}")
    output.print(f"{count(export.written, 'event')}, {export.size:,} bytes, written to {to}")
    if export.written == limit:
        output.note(f"that is as many as --limit {limit} allows: there may be more")
    if output.json:
        told = {"events": export.written, "bytes": export.size, "to": str(to)}
        output.line(
            {**told, "left_out": sum(export.left_out.values()), "withheld": dict(sorted(export.withheld.items()))}
        )


async def _events(call: Invocation, log: Log, topics: list[str]) -> AsyncGenerator[Found, None]:
    """Yield the events that are asked for, the newest first: by the index, or of the log."""
    arguments = call.arguments
    if arguments.query is None:
        since = None if arguments.since is None else log.now() - arguments.since
        async with aclosing(newest_first(log, topics, since=since)) as history:
            async for found in history:
                if arguments.source is None or _source_of(found) in (None, arguments.source):
                    yield found
        return
    for name, position in await asyncio.to_thread(_positions, call):
        at = await find_event(log, topics, position)
        if at is not None and decode_event(at.record).id == name:
            yield at
        else:
            call.output.note(f"{name}, {position}: {GONE}", style="yellow")


def _source_of(found: Found) -> str | None:
    """Return an event's source; None if it can't be read."""
    try:
        return decode_event(found.record).source
    except UnreadableRecordError:
        return None


def _positions(call: Invocation) -> list[tuple[str, str]]:
    """Return the ids and positions of the events that the query finds; those of which no record is known have none."""
    arguments, now = call.arguments, time.time()
    query = parse_query(arguments.query, now=now)
    if arguments.since is not None:
        query = replace(query, since=max(query.since, now - arguments.since))
    with index_to_read(call.settings.index.file) as index:
        found = [(event.id, event.position) for event in index.search(query, arguments.limit)]
    return [each for each in found if each[1]]
