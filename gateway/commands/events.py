"""`gateway events`: the events in the log."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    opened_log,
    readable_rules,
    rules_without_secrets,
)
from gateway.commands.values import Parser, duration, positive
from gateway.index.query import parse_query
from gateway.index.reading import Currency, index_to_read
from gateway.index.results import IndexedDelivery, IndexedEvent
from gateway.log.base import Log
from gateway.log.records import decode_event
from gateway.model import Event, RulesError, UnreadableRecordError, UsageError
from gateway.ops.delivery_presentation import journey_fields, print_deliveries
from gateway.ops.index_presentation import (
    currency_fields,
    event_in_log_fields,
    event_in_log_row,
    in_order,
    indexed_fields,
    print_currency,
    print_indexed,
)
from gateway.ops.log_search import Found, find_event, is_position, newest_first, original_of
from gateway.ops.output import Output
from gateway.ops.presentation import Row, event_content, event_fields, event_row, print_event, print_rows
from gateway.ops.redaction import Redactions
from gateway.ops.responses_in_log import Response, responses_of, with_last_attempts
from gateway.required_topics import event_topics
from gateway.rules.rules import Rules
from gateway.text import did_you_mean


def events_arguments(parser: Parser) -> None:
    parser.add_argument("--source", metavar="SOURCE", help="only events of this source")
    events_limits(parser)
    api_arguments(parser)


def events_limits(parser: Parser) -> None:
    parser.add_argument(
        "--limit", type=positive, default=20, metavar="N", help="show at most N, newest first (default: 20)"
    )
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only those stored in the last DURATION (such as 1h)"
    )


@command(
    "events list",
    about="list the newest events in the log",
    example="gateway events list --source github --since 1h",
    add_arguments=events_arguments,
    settings=("rules", *LOG_SETTINGS),
)
async def _events_list(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    if api_of(call) is not None:
        return await _list_by_api(call)
    topics = event_topics_of(call, arguments.source)
    hidden = Redactions(readable_rules(call))
    rows: list[Row] = []
    async with opened_log(call) as log:
        since = None if arguments.since is None else log.now() - arguments.since
        with output.waiting("reading the log"):
            async with aclosing(newest_first(log, topics, since=since)) as history:
                async for found in history:
                    if len(rows) == arguments.limit:
                        break
                    event, problem = _event_of(found)
                    if event is not None and arguments.source not in (None, event.source):
                        continue
                    seen = None if event is None else hidden.names(event)
                    if output.json:
                        output.line(event_fields(found, seen, problem))
                    rows.append(event_row(found, seen, problem))
    if rows:
        print_rows(output, rows)
    else:
        output.print("no events")
    return 0


async def _list_by_api(call: Invocation) -> int:
    """List the newest events that the index of a process has, as those in the log are listed."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import searched  # noqa: PLC0415 - a tenth of a second

    arguments, output = call.arguments, call.output
    query = query_of("" if arguments.source is None else f"source:{arguments.source}", arguments.since)
    rows: list[Row] = []
    currency = Currency(complete_to=0.0, settled_at=0.0)
    async with client_of(call) as client:
        with output.waiting("searching"):
            async for event, currency in searched(client, query, arguments.limit):  # noqa: B007 - the last
                if event is not None and output.json:
                    output.line(event_in_log_fields(event))
                elif event is not None:
                    rows.append(event_in_log_row(event))
    if rows:
        print_rows(output, rows)
    else:
        output.print("no events")
    print_currency(output, currency)
    return 0


def query_of(query: str, since: float | None) -> str:
    """Return a query for events that were stored in the last so many seconds, as well."""
    return query if since is None else f"{query} since:{math.ceil(since)}s"


def search_arguments(parser: Parser) -> None:
    about = "the query, as one argument: 'status:dead body.order.id:42', ' -status:done', or '' for all events"
    parser.add_argument("query", metavar="QUERY", help=about)
    events_limits(parser)
    api_arguments(parser)


@command(
    "events search",
    about="find events in the search index, by field, by words in the body, and by delivery status",
    example="gateway events search 'source:github -status:delivered since:2h body.repository.full_name:acme/app'",
    add_arguments=search_arguments,
    settings=("index",),
)
def _events_search(call: Invocation) -> int | Coroutine[Any, Any, int]:
    arguments, output, path = call.arguments, call.output, call.settings.index.file
    if api_of(call) is not None:
        return _search_by_api(call)
    now = time.time()
    query = parse_query(arguments.query, now=now)
    if arguments.since is not None:
        query = replace(query, since=max(query.since, now - arguments.since))
    found: list[IndexedEvent] = []
    with index_to_read(path) as index:
        with output.waiting("searching"):
            for event in index.search(query, arguments.limit):
                if output.json:
                    output.line(indexed_fields(event))
                else:
                    found.append(event)
        if output.json:
            output.line(currency_fields(path, index.currency))
        elif found:
            print_indexed(output, found)
        else:
            output.print("no events")
        print_currency(output, index.currency)
    return 0


async def _search_by_api(call: Invocation) -> int:
    """Do the same by the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import searched  # noqa: PLC0415 - a tenth of a second

    arguments, output = call.arguments, call.output
    found: list[IndexedEvent] = []
    currency = Currency(complete_to=0.0, settled_at=0.0)
    async with client_of(call) as client:
        with output.waiting("searching"):
            async for event, currency in searched(client, query_of(arguments.query, arguments.since), arguments.limit):  # noqa: B007 - the last
                if event is not None and output.json:
                    output.line(indexed_fields(event))
                elif event is not None:
                    found.append(event)
        if output.json:
            output.line(currency_fields(client.url, currency))
    if found:
        print_indexed(output, found)
    elif not output.json:
        output.print("no events")
    print_currency(output, currency)
    return 0


async def _show_by_api(call: Invocation) -> int:
    """Do the same by the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import stored  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_deliveries import ApiDeliveries  # noqa: PLC0415 - a tenth of a second

    arguments = call.arguments
    if arguments.all or arguments.source is not None:
        raise UsageError("events show: expected neither --all nor --source with --api")
    async with client_of(call) as client:
        found, event, size = await stored(client, arguments.id)
        if not arguments.deliveries:
            _print_found(call.output, Redactions(None), (found, event, ""), size=size)
            return 0
        deliveries = ApiDeliveries(client)
        known, its, currency = await deliveries.of_event(found.position)
    journey = _Journey(known, its, deliveries.responses)
    _print_found(call.output, Redactions(None), (found, event, ""), journey, size=size)
    print_currency(call.output, currency)
    return 0


def event_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="the event's id, or its position, TOPIC/PARTITION@OFFSET")
    parser.add_argument("--source", metavar="SOURCE", help="search only this source")
    parser.add_argument("--all", action="store_true", help="show every record with this id, not only the newest")
    about = "also show its deliveries, from the search index (kept by `gateway run --role console`)"
    parser.add_argument("--deliveries", action="store_true", help=about)
    api_arguments(parser)


@command(
    "events show",
    about="show an event with its headers and body",
    example="gateway events show evt_9c1f…",
    add_arguments=event_arguments,
    settings=("rules", "index", *LOG_SETTINGS),
)
async def _events_show(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    if api_of(call) is not None:
        return await _show_by_api(call)
    if arguments.deliveries:
        await asyncio.to_thread(_looked_up, call.settings.index.file, ())  # before the log is searched
    found_events: list[tuple[Found, Event, str]] = []
    topics = event_topics_of(call, arguments.source)
    rules = readable_rules(call)
    async with opened_log(call) as log:
        if is_position(arguments.id, topics):
            one = await find(call, log, topics, arguments.id)
            if one is None:
                return 1
            history = _these([one])
        else:
            history = newest_first(log, topics)
        with output.waiting(f"looking for {arguments.id}"):
            async with aclosing(history):
                async for found in history:
                    event, _ = _event_of(found)
                    if event is not None and arguments.id in (event.id, found.position):
                        found_events.append((found, event, await position_of_original(rules, log, found, event)))
                        if not arguments.all:
                            break
        if not found_events:
            output.fail(NEITHER.format(arguments.id))
            return 1
        await _print_all(call, log, found_events, Redactions(rules))
    return 0


async def _print_all(
    call: Invocation, log: Log, found_events: Sequence[tuple[Found, Event, str]], hidden: Redactions
) -> None:
    if not call.arguments.deliveries:
        for each in found_events:
            _print_found(call.output, hidden, each)
        return
    events = [(event.id, found.position) for found, event, _ in found_events]
    known, currency = await asyncio.to_thread(_looked_up, call.settings.index.file, events)
    for each, journey in zip(found_events, known, strict=True):
        tried = [] if journey.event is None else with_last_attempts(journey.event, journey.deliveries)
        responses = await responses_of(log, call.settings.index.file, tried, hidden)
        _print_found(call.output, hidden, each, journey._replace(responses=responses))
    print_currency(call.output, currency)


class _Journey(NamedTuple):
    """What the index has of an event, its deliveries, and what was responded to the last attempts of these."""

    event: IndexedEvent | None
    deliveries: Sequence[IndexedDelivery]
    responses: Mapping[object, Response] = MappingProxyType({})


def _looked_up(path: Path, events: Iterable[tuple[str, str]]) -> tuple[list[_Journey], Currency]:
    """Return what the index has of events, by their ids and positions, and how current it is."""
    with index_to_read(path) as index:
        known = [index.event(*each) for each in events]
        its = [() if each is None else in_order(index.deliveries(each)) for each in known]
        return [_Journey(*each) for each in zip(known, its, strict=True)], index.currency


def _print_found(
    output: Output,
    hidden: Redactions,
    found_event: tuple[Found, Event, str],
    journey: _Journey | None = None,
    *,
    size: int | None = None,
) -> None:
    """Print an event as people may see it; with what the index has of it, what has become of it."""
    found, event, copied = found_event
    known, deliveries, responses = journey or _Journey(None, ())
    seen = hidden.rewritten(event)
    its = [] if known is None else with_last_attempts(known, deliveries)
    told = [responses.get(each.cursor) for each in its]
    if output.json:
        more: dict[str, object] = {"duplicate_of": copied} if copied else {}
        if journey is not None:
            fields = [journey_fields(each, response) for each, response in zip(deliveries, told, strict=True)]
            more |= {"status": None if known is None else known.status, "deliveries": fields}
        size = len(event.body) if size is None else size  # as it came
        output.line(event_fields(found, seen, "", size=size) | more | event_content(seen))
        return
    print_event(output, seen, found.position, copied)
    if known is not None:
        print_deliveries(output, known, deliveries, told)
    elif journey is not None:
        output.note(f"{found.position}: the index doesn't have it", style="yellow")


NEITHER = "{}: expected the id of an event in the log, or its position, got neither"


async def find(call: Invocation, log: Log, topics: Iterable[str], name: str) -> Found | None:
    """Return the event with an id or at a position; print an error if there is none, or it can't be read."""
    try:
        with call.output.waiting(f"looking for {name}"):
            found = await find_event(log, topics, name)
    except UnreadableRecordError as error:
        call.output.fail(f"{name}: expected an event there, got a record that can't be read: {error}")
        return None
    if found is None:
        call.output.fail(NEITHER.format(name))
    return found


async def _these(found: Sequence[Found]) -> AsyncGenerator[Found, None]:
    for each in found:
        yield each


async def position_of_original(rules: Rules | None, log: Log, found: Found, event: Event) -> str:
    """Return the position of the event that one duplicates by the local rules; "" if it is no duplicate."""
    source = None if rules is None else rules.sources.get(event.source)
    if source is None or source.dedupe is None:
        return ""
    original = await original_of(log, found, event, source.dedupe)
    return "" if original is None else original.position


def event_topics_of(call: Invocation, source: str | None) -> list[str]:
    """Return the topics of events. Without readable rules, a source's topic is derived from its name."""
    try:
        rules = rules_without_secrets(call.settings.rules)
    except RulesError:
        if source is None:
            raise
        return [call.topics.events(source)]
    if source is not None and source not in rules.sources:
        raise UsageError(f"--source: unknown source {source!r}{did_you_mean(source, rules.sources)}")
    return sorted(
        event_topics(rules, call.topics)
        if source is None
        else event_topics(replace(rules, sources={source: rules.sources[source]}), call.topics)
    )


def _event_of(found: Found) -> tuple[Event | None, str]:
    try:
        return decode_event(found.record), ""
    except UnreadableRecordError as error:
        return None, str(error)
