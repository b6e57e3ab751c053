"""Deliveries by the API of a process, with what was responded to their last attempts, where the token may read it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.index.delivery_query import DeliveryQuery
from gateway.index.reading import Currency
from gateway.index.results import IndexedDelivery, IndexedEvent, ListedDelivery
from gateway.ops.api_answers import Answer, currency_of, delivery_of, event_of, listed_of, time_of
from gateway.ops.api_client import ApiClient, ApiRefusedError, ApiUnavailableError
from gateway.ops.delivery_presentation import ListedDeliveries
from gateway.ops.responses_in_log import Response, with_last_attempts

_WITHOUT = ("forbidden", "log_unavailable")
"""Codes with which deliveries are listed all the same, without responses."""


class ApiDeliveries:
    """Deliveries by the API. `responses` are those to the last attempts of what was found, by the cursor of each.

    `problem` is why there are none, "" if there are.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self.responses: dict[object, Response] = {}
        self.problem = ""

    async def listed(self, query: DeliveryQuery, limit: int) -> ListedDeliveries:
        """Return the deliveries that a query finds, so many at most."""
        found: list[ListedDelivery] = []
        unrecorded, currency = None, Currency(complete_to=0.0, settled_at=0.0)
        statuses = "" if query.statuses is None else ",".join(sorted(query.statuses))
        asked = {"route": query.route, "destination": query.destination, "source": query.source, "status": statuses}
        async with aclosing(self._pages("deliveries", limit=limit, **asked)) as pages:
            async for page in pages:
                currency = currency_of(page["index"])
                if page["unrecorded_since"] is not None:
                    unrecorded = time_of(page["unrecorded_since"])
                for item in page["items"]:
                    found.append(listed_of(item, len(found)))
                    self._note(found[-1], item["delivery"])
        return ListedDeliveries(found, unrecorded, currency)

    async def of_event(self, name: str) -> tuple[IndexedEvent, list[IndexedDelivery], Currency]:
        """Return what the index of the process has of an event."""
        answer = await self._client.get("events", name)
        event, its, currency = event_of(answer["event"]), list[IndexedDelivery](), currency_of(answer["index"])
        async with aclosing(self._pages("events", name, "deliveries")) as pages:
            async for page in pages:
                currency = currency_of(page["index"])
                for item in page["items"]:
                    its.append(delivery_of(item))
                    self._note(with_last_attempts(event, its[-1:])[0], item)
        return event, its, currency

    def _note(self, listed: ListedDelivery, item: Answer) -> None:
        if item["response"] is not None:
            self.responses[listed.cursor] = Response(item["response"].encode())

    async def _pages(self, *path: str, limit: int | None = None, **asked: str | None) -> AsyncGenerator[Answer, None]:
        """Yield pages with responses, or without them if there are none for this token, or now."""
        has_begun = False
        try:
            pages = self._client.pages(*path, limit=limit, include_responses=True, **asked)
            async with aclosing(pages):
                async for page in pages:
                    has_begun = True
                    yield page
        except (ApiRefusedError, ApiUnavailableError) as error:
            if has_begun or error.code not in _WITHOUT:
                raise
            self.problem = str(error)
        if self.problem:
            async with aclosing(self._client.pages(*path, limit=limit, **asked)) as others:
                async for page in others:
                    yield page
