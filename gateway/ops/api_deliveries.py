"""Lists of deliveries by the API of a process, with what was responded to their last attempts."""

import asyncio
from collections.abc import Mapping, Sequence

from gateway.index.delivery_query import DeliveryQuery
from gateway.index.reading import Currency
from gateway.index.results import IndexedAttempt, ListedDelivery
from gateway.ops.api_answers import currency_of, listed_of, time_of
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.delivery_presentation import ListedDeliveries
from gateway.ops.responses_in_log import Response

AT_A_TIME = 8
"""Responses that are asked for at a time: the API answers 64 requests."""


async def found_by_api(client: ApiClient, query: DeliveryQuery, limit: int) -> ListedDeliveries:
    """Return the deliveries that a query finds, so many at most."""
    statuses = "" if query.statuses is None else ",".join(sorted(query.statuses))
    found: list[ListedDelivery] = []
    unrecorded, currency = None, Currency(complete_to=0.0, settled_at=0.0)
    pages = client.pages(
        "deliveries",
        limit=limit,
        status=statuses,
        route=query.route,
        destination=query.destination,
        source=query.source,
    )
    async for page in pages:
        currency = currency_of(page["index"])
        if page["unrecorded_since"] is not None:
            unrecorded = time_of(page["unrecorded_since"])
        found += [listed_of(item, len(found) + number) for number, item in enumerate(page["items"])]
    return ListedDeliveries(found, unrecorded, currency)


async def responses_by_api(client: ApiClient, found: Sequence[ListedDelivery]) -> tuple[Mapping[object, Response], str]:
    """Return the responses to the last attempts of deliveries, by the cursor of each, and why there are none.

    Of an attempt that isn't in the log any more there is none.
    """
    turns = asyncio.Semaphore(AT_A_TIME)
    responses: dict[object, Response] = {}
    problems: list[str] = []

    async def ask(each: ListedDelivery, attempt: IndexedAttempt) -> None:
        async with turns:
            if problems:
                return
            assert attempt.partition is not None
            position = f"{attempt.partition.topic}/{attempt.partition.number}@{attempt.offset}"
            try:
                record = await client.get("attempts", position)
            except (ApiRefusedError, ApiUnavailableError) as error:
                problems.extend([] if error.code == "not_found" else [str(error)])
                return
            if record["delivery_id"] == each.delivery.id and record["response_body"] is not None:
                responses[each.cursor] = Response(record["response_body"].encode())

    async with asyncio.TaskGroup() as tasks:
        for each in found:
            if each.delivery.attempts and each.delivery.attempts[0].partition is not None:
                tasks.create_task(ask(each, each.delivery.attempts[0]), name="ask-response")
    return responses, problems[0] if problems else ""
