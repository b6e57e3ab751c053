"""`gateway deliveries`: what the index has of deliveries, such as what waits for a destination."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    api_arguments,
    api_of,
    command,
    note_unknown_of,
    opened_log,
    readable_rules,
)
from gateway.commands.values import Parser, positive
from gateway.index.delivery_query import WAITING, DeliveryQuery
from gateway.index.file import IndexUnavailableError
from gateway.index.reading import index_to_read
from gateway.index.results import ListedDelivery
from gateway.index.statuses import OF_DELIVERIES, Status
from gateway.model import LogUnavailableError, UsageError
from gateway.ops.delivery_presentation import (
    ListedDeliveries,
    listed_fields,
    print_listed,
    print_unrecorded,
    unrecorded_fields,
)
from gateway.ops.index_presentation import currency_fields, print_currency
from gateway.ops.redaction import Redactions
from gateway.ops.responses_in_log import Response, responses_of
from gateway.text import did_you_mean


def deliveries_arguments(parser: Parser) -> None:
    parser.add_argument("--destination", metavar="NAME", help="only deliveries to this destination")
    parser.add_argument("--route", metavar="NAME", help="only deliveries of this route")
    parser.add_argument("--source", metavar="NAME", help="only deliveries of this source's events")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--waiting", action="store_true", help=f"only waiting deliveries: {', '.join(sorted(WAITING))}")
    about = f"only deliveries with this status; comma-separated: {', '.join(OF_DELIVERIES)}"
    which.add_argument("--status", metavar="STATUS", help=about)
    parser.add_argument(
        "--limit", type=positive, default=20, metavar="N", help="show at most N, newest events first (default: 20)"
    )
    api_arguments(parser)


@command(
    "deliveries list",
    about="list deliveries from the search index: what waits, since when, until when, and the last response",
    example="gateway deliveries list --destination ci --waiting",
    add_arguments=deliveries_arguments,
    settings=("rules", "index", *LOG_SETTINGS),
)
async def _deliveries_list(call: Invocation) -> int:
    arguments = call.arguments
    statuses = WAITING if arguments.waiting else _statuses(arguments.status)
    query = DeliveryQuery(
        route=arguments.route, destination=arguments.destination, source=arguments.source, statuses=statuses
    )
    if api_of(call) is not None:
        return await _list_by_api(call, query)
    path = call.settings.index.file
    with call.output.waiting("searching"):
        listed = await asyncio.to_thread(_found, path, query, arguments.limit)
    if not listed.found:
        note_unknown_of(call)
    return _print(call, path, query, listed, await _responses(call, listed.found))


async def _list_by_api(call: Invocation, query: DeliveryQuery) -> int:
    """Do the same by the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_deliveries import ApiDeliveries  # noqa: PLC0415 - a tenth of a second

    async with client_of(call) as client:
        with call.output.waiting("searching"):
            deliveries = ApiDeliveries(client)
            listed = await deliveries.listed(query, call.arguments.limit)
    if deliveries.problem:
        call.output.note(f"what was responded isn't shown: {deliveries.problem}", style="yellow")
    return _print(call, client.url, query, listed, deliveries.responses)


def _print(
    call: Invocation,
    where: Path | str,
    query: DeliveryQuery,
    listed: ListedDeliveries,
    responses: Mapping[object, Response],
) -> int:
    output = call.output
    found, unrecorded, currency = listed
    if output.json:
        for each in found:
            output.line(listed_fields(each, responses.get(each.cursor)))
        output.line(currency_fields(where, currency) | unrecorded_fields(unrecorded))
    elif found:
        print_listed(output, found, responses)
    else:
        output.print("no deliveries")
    print_currency(output, currency)
    may_lack = query.statuses is None or Status.PENDING in query.statuses
    if unrecorded is not None and may_lack:
        print_unrecorded(output, unrecorded)
    return 0


def _found(path: Path, query: DeliveryQuery, limit: int) -> ListedDeliveries:
    with index_to_read(path) as index:
        found, unrecorded = index.list_deliveries(query, limit)
        return ListedDeliveries(found, unrecorded, index.currency)


async def _responses(call: Invocation, found: Sequence[ListedDelivery]) -> Mapping[object, Response]:
    """Return what was responded to the last attempts, as the log has it; without it, the rest is shown all the same."""
    if not any(each.delivery.attempts and each.delivery.attempts[0].partition for each in found):
        return {}
    try:
        async with opened_log(call) as log:
            return await responses_of(log, call.settings.index.file, found, Redactions(readable_rules(call)))
    except (LogUnavailableError, IndexUnavailableError, UsageError) as error:
        call.output.note(f"what was responded isn't shown, as it can't be read: {error}", style="yellow")
        return {}


def _statuses(text: str | None) -> frozenset[Status] | None:
    if text is None:
        return None
    names = [each.strip() for each in text.split(",")]
    for name in names:
        if name not in OF_DELIVERIES:
            near = did_you_mean(name, OF_DELIVERIES)
            raise UsageError(f"--status: expected one of {', '.join(OF_DELIVERIES)}, got {name!r}{near}")
    return frozenset(map(Status, names))
