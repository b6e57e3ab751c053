"""Brings the responses of destinations to the senders that wait for them (`respond: after_delivery`).

    request ─▶ expect ─▶ append ─────────────────▶ wait ─▶ response, or the default one if none comes in time
                            │                        ▲
                            └▶ delivery ─▶ attempt ──┤ taken: in this process
                                                     └ `gateway.responses`: in another one, where there are several

The event is stored before its sender waits, and is delivered like any other, whatever the sender gets. Delivery depends
on nothing here: a lost response is one that doesn't come in time.

A response is for those who have sent that event: its id, and its content, since an identity is the sender's choice.
Both are what `dedupe` goes by: of an event that is sent again and delivered once, both senders get the response.
"""

import asyncio
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from time import perf_counter
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Assignment, Commit, Consumer, Log, Partition
from gateway.log.records import ResponseTo, decode_response, encode_response, fingerprint
from gateway.log.topics import Topics
from gateway.model import (
    Delivery,
    DestinationResponse,
    Event,
    EventId,
    GatewayError,
    LogUnavailableError,
    NewerRecordError,
    UndecodableRecordError,
)
from gateway.quarantine.quota import FairBucket
from gateway.rules.rules import AfterDelivery, Rules
from gateway.telemetry.log_throttle import LogThrottle

MAX_WAITING = 4000
"""Waiting senders per process, shared fairly by sources (`FairBucket`): one has at most half of the places.

Any other gets the default response at once.
"""
MAX_APPENDS = 1000
"""Appends of responses in flight, for other processes, shared in the same way; any other response is dropped."""
DRAIN = 1.0
"""Seconds for which a stopping process still waits for destinations."""
LOOK_BACK = 30.0
"""Seconds before its start of which a process reads the responses: nobody waits longer for one."""
RETRY = 1.0
"""Seconds until a topic that can't be read is tried again."""
WARNING_INTERVAL = 60.0
_GATEWAY_STATUSES = {
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
}
"""Client errors about the gateway's own request, not the sender's: retried, or left to an operator."""


class Undecodable(Protocol):
    """Counts and logs records that can't be decoded."""

    def count_undecodable(self, topic: str, offset: int, error: UndecodableRecordError) -> None: ...

    def report_newer(self, partition: Partition, offset: int, error: NewerRecordError) -> None: ...


class Sent(Protocol):
    """The part of a request to a destination that is used here."""

    @property
    def delivery(self) -> Delivery | None: ...


def for_sender(response: DestinationResponse | None) -> DestinationResponse | None:
    """Return the response if a sender gets it: a success, or a client error that isn't about the gateway."""
    if response is None or response.status // 100 not in (2, 4) or response.status in _GATEWAY_STATUSES:
        return None
    return response


class Waiting:
    """A sender that waits for a destination's response to an event; the caller closes it."""

    __slots__ = ("_done", "_responses", "_timeout", "owner", "to")

    def __init__(
        self, responses: "DestinationResponses", to: ResponseTo, after: AfterDelivery, owner: Hashable
    ) -> None:
        self.to = to
        self.owner = owner
        """Whose place it has."""
        self._timeout = after.timeout
        self._responses = responses
        self._done: asyncio.Future[tuple[DestinationResponse | None, str]] = asyncio.get_running_loop().create_future()

    async def response(self, began: float) -> tuple[DestinationResponse | None, str]:
        """Return the response, if one comes in time, and the outcome, as in the metric.

        `began` is when the request was received, by `perf_counter`.
        """
        try:
            async with asyncio.timeout(began + self._timeout - perf_counter()):
                return await self._done
        except TimeoutError:
            return None, "timeout"

    def take(self, response: DestinationResponse | None) -> None:
        self._end(response, "failed" if response is None else "sent")

    def leave(self) -> None:
        """End the wait: the sender has closed its connection."""
        self._end(None, "gone")

    def _end(self, response: DestinationResponse | None, outcome: str) -> None:
        if not self._done.done():
            self._done.set_result((response, outcome))

    def close(self) -> None:
        self._responses.forget(self)


class DestinationResponses:
    """The waiting senders of one process, and how a response gets to those of another one.

    `rules` returns the active rules. `is_shared` is whether other processes use the same log.
    """

    def __init__(
        self,
        *,
        rules: Callable[[], Rules],
        log: Log,
        topics: Topics,
        undecodable: Undecodable,
        logger: FilteringBoundLogger,
        is_shared: bool,
    ) -> None:
        self._rules = rules
        self._log = log
        self._topic = topics.responses
        self._undecodable = undecodable
        self._logger = logger
        self._is_shared = is_shared
        self._waiting: dict[EventId, list[Waiting]] = {}
        now = perf_counter()
        self._places = FairBucket(capacity=MAX_WAITING, rate=0.0, now=now)
        self._append_places = FairBucket(capacity=MAX_APPENDS, rate=0.0, now=now)
        self._is_stopping = False
        self._appends: set[asyncio.Task[None]] = set()
        self._throttle = LogThrottle(WARNING_INTERVAL)
        self._consumer: Consumer | None = None

    def expect(self, event: Event, after: AfterDelivery) -> Waiting | None:
        """Begin to wait, before the event is appended; None if too many do. A stopping process waits for nothing."""
        if not self._places.has(event.source, 1, now=perf_counter()):
            return None
        waiting = Waiting(self, _to(event, after.destination), after, self._places.take(event.source, 1))
        if self._is_stopping:
            waiting.take(None)
        self._waiting.setdefault(event.id, []).append(waiting)
        return waiting

    def forget(self, waiting: Waiting) -> None:
        """Stop waiting."""
        others = self._waiting.get(waiting.to.event, [])
        if waiting in others:
            self._places.give_back(waiting.owner, 1)
            others.remove(waiting)
            if not others:
                del self._waiting[waiting.to.event]

    def stop(self) -> None:
        """End all waits after DRAIN seconds."""
        self._is_stopping = True
        asyncio.get_running_loop().call_later(DRAIN, self._give_up)

    def wait_for(self, sent: Sent) -> bool:
        """Return whether a sender may wait for the response to this request, here or at another process."""
        delivery = sent.delivery
        if delivery is None:
            return False
        if delivery.event.id in self._waiting and self._waiting_for(_to(delivery.event, delivery.destination)):
            return True
        after = self._after_delivery(delivery.event.source) if self._is_shared else None
        return (
            after is not None
            and after.destination == delivery.destination
            and self._log.now() < delivery.event.received_at + after.timeout
        )

    def take(self, sent: Sent, response: DestinationResponse | None) -> None:
        """Take a destination's response; None if there was none, or an incomplete one."""
        delivery = sent.delivery
        if delivery is None:
            return
        found, to = for_sender(response), _to(delivery.event, delivery.destination)
        if self._take(to, found) or not self._is_shared:
            return
        if self._append_places.has(source := delivery.event.source, 1, now=perf_counter()):
            owner = self._append_places.take(source, 1)
            append = asyncio.get_running_loop().create_task(self._append(to, found, owner))
            self._appends.add(append)
            append.add_done_callback(self._appends.discard)

    def is_for_them(self, response: DestinationResponse) -> bool:
        """Return whether a sender gets such a response."""
        return for_sender(response) is not None

    def withhold(self, sent: Sent) -> None:
        """Take a response that no sender gets, since it repeats a credential of ours."""
        delivery = sent.delivery
        if delivery is not None and self._throttle.count(delivery.destination, asyncio.get_running_loop().time()):
            self._logger.warning(
                "response_withheld",
                destination=delivery.destination,
                route=delivery.route,
                event_id=delivery.event.id,
            )
        self.take(sent, None)

    def unreadable(self) -> Mapping[Partition, str]:
        """Return which partitions of responses can't be read, and why."""
        return {} if self._consumer is None else self._consumer.unreadable()

    async def follow(self) -> None:
        """Take the responses that other processes have received, until cancelled."""
        while not self._is_shared or not self._is_needed():  # noqa: ASYNC110 - a reload has no event here
            await asyncio.sleep(1.0)
        while self._consumer is None:
            try:
                since = self._log.now() - LOOK_BACK
                self._consumer = await self._log.consume(group=None, topics=[self._topic], listener=self, since=since)
            except LogUnavailableError as error:
                if self._throttle.count(self._topic, asyncio.get_running_loop().time()):
                    self._logger.warning("subscription_retried", topic=self._topic, error=str(error))
                await asyncio.sleep(RETRY)
        try:
            while True:
                for batch in await self._consumer.fetch(timeout=1.0):
                    for record in batch.records:
                        try:
                            self._take(*decode_response(record))
                        except UndecodableRecordError as error:
                            self._undecodable.count_undecodable(self._topic, record.offset, error)
                        except NewerRecordError as error:
                            self._undecodable.report_newer(batch.partition, record.offset, error)
        finally:
            await self._consumer.close()

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        """Nothing to take over: a reader without a group has no commits."""

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Ignored: nobody waits for what is that old."""

    def restarted(self, assignment: Assignment) -> None:
        """Ignored: the new topic is read like the old one."""

    def _after_delivery(self, source: str) -> AfterDelivery | None:
        found = self._rules().sources.get(source)
        return None if found is None or found.response is None else found.response.after_delivery

    def _is_needed(self) -> bool:
        return any(map(self._after_delivery, self._rules().sources))

    def _waiting_for(self, to: ResponseTo) -> list[Waiting]:
        return [each for each in self._waiting.get(to.event, ()) if each.to == to]

    def _take(self, to: ResponseTo, response: DestinationResponse | None) -> bool:
        """Return whether a sender was waiting for it in this process."""
        waiting = self._waiting_for(to)
        for each in waiting:
            each.take(response)
        return bool(waiting)

    def _give_up(self) -> None:
        for waiting in self._waiting.values():
            for each in waiting:
                each.take(None)

    async def _append(self, to: ResponseTo, response: DestinationResponse | None, owner: Hashable) -> None:
        value = b"" if response is None else response.body
        try:
            with suppress(GatewayError):  # the sender gets the default response
                headers = encode_response(to, response)
                await self._log.append(self._topic, key=to.event.encode(), value=value, headers=headers)
        finally:
            self._append_places.give_back(owner, 1)


def _to(event: Event, destination: str) -> ResponseTo:
    return ResponseTo(event.id, fingerprint(event), destination)
