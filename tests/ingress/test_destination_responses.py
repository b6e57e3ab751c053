"""Which responses senders wait for, get, and what is passed between processes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, cast

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.engine.undecodable_records import UndecodableRecords
from gateway.ingress.destination_responses import (
    LOOK_BACK,
    MAX_APPENDS,
    MAX_WAITING,
    DestinationResponses,
    Waiting,
    for_sender,
)
from gateway.log.records import ResponseTo, encode_response, fingerprint
from gateway.log.topics import Topics
from gateway.model import Delivery, DestinationResponse, Event, EventId
from gateway.rules.rules import AfterDelivery, Rules, StoredResponse
from gateway.telemetry.metrics import Metrics
from tests.builders import a_delivery, an_event
from tests.ingress.test_ingress import some_rules
from tests.memory_log import MemoryLog

if TYPE_CHECKING:
    from gateway.log.base import Log

TOPICS = Topics()
CHAT = AfterDelivery(destination="chat", timeout=5.0)
FINE = DestinationResponse(status=200, content_type=b"text/plain", body=b"fine")


@dataclass(frozen=True)
class Sent:
    delivery: Delivery | None


def waiting_rules(timeout: float = 5.0) -> Rules:
    rules = some_rules()
    response = StoredResponse(after_delivery=AfterDelivery(destination="chat", timeout=timeout))
    source = replace(rules.sources["github"], response=response)
    return replace(rules, sources={**rules.sources, "github": source})


@dataclass
class Fleet:
    """Two processes on one log: one has the senders, the other one makes the attempts."""

    log: MemoryLog
    ingress: DestinationResponses
    router: DestinationResponses
    metrics: Metrics


@asynccontextmanager
async def fleet(
    rules: Callable[[], Rules] = waiting_rules, *, is_shared: bool = True, now: Callable[[], float] = time.time
) -> AsyncIterator[Fleet]:
    log, metrics = MemoryLog(now=now), Metrics(CollectorRegistry())
    await log.create(TOPICS.specs([], has_responses=True))

    def process() -> DestinationResponses:
        return DestinationResponses(
            rules=rules,
            log=cast("Log", log),
            topics=TOPICS,
            undecodable=UndecodableRecords(topics=TOPICS, metrics=metrics, logger=structlog.get_logger(), now=log.now),
            logger=structlog.get_logger(),
            is_shared=is_shared,
        )

    one, other = process(), process()
    following = asyncio.create_task(one.follow())
    try:
        yield Fleet(log, one, other, metrics)
    finally:
        following.cancel()
        await asyncio.wait([following])


def an_order(event_id: str = "evt_1", *, source: str = "github", order: int = 1, received_at: float = 0.0) -> Event:
    return an_event(id=event_id, source=source, body={"order": order}, received_at=received_at)


def sent(*, destination: str = "chat", age: float = 0.0, order: int = 1, log: MemoryLog) -> Sent:
    return Sent(a_delivery(event=an_order(order=order, received_at=log.now() - age), destination=destination))


def expected(
    responses: DestinationResponses, destination: str = "chat", timeout: float = 5.0, order: int = 1
) -> Waiting:
    waiting = responses.expect(an_order(order=order), AfterDelivery(destination=destination, timeout=timeout))
    assert waiting is not None
    return waiting


def fine(event: Event) -> list[tuple[str, bytes]]:
    return encode_response(ResponseTo(event.id, fingerprint(event), "chat"), FINE)


async def test_a_response_goes_to_all_who_wait_for_it_here_and_to_nobody_else() -> None:
    async with fleet() as processes:
        here, log = processes.ingress, processes.log
        waiting = [expected(here), expected(here), expected(here, "audit", timeout=0.1)]
        request = sent(log=log)
        assert here.wait_for(request)
        here.take(request, FINE)
        assert [await each.response(perf_counter()) for each in waiting] == [(FINE, "sent")] * 2 + [(None, "timeout")]
        assert not await log.bounds(TOPICS.responses) or {
            end for _, end in (await log.bounds(TOPICS.responses)).values()
        } == {0}
        for each in waiting:
            each.close()
            each.close()
        assert not here._waiting
        assert not here._places._debts


@pytest.mark.parametrize("response", [FINE, DestinationResponse(status=204), DestinationResponse(status=503), None])
async def test_a_response_is_passed_to_the_process_whose_sender_waits(response: DestinationResponse | None) -> None:
    async with fleet() as processes:
        waiting, request = expected(processes.ingress), sent(log=processes.log)
        assert processes.router.wait_for(request)
        processes.router.take(request, response)
        passed_on = for_sender(response)
        assert await waiting.response(perf_counter()) == (passed_on, "failed" if passed_on is None else "sent")


@pytest.mark.parametrize("is_here", [True, False])
async def test_a_response_goes_to_no_sender_of_another_event_with_that_id(*, is_here: bool) -> None:
    """Who shares a source with others would get their responses by sending an identity that they send."""
    async with fleet() as processes:
        waiting = [expected(processes.ingress, order=order) for order in (1, 2)]
        client = processes.ingress if is_here else processes.router
        client.take(sent(log=processes.log, order=1), FINE)
        assert await waiting[0].response(perf_counter()) == (FINE, "sent")
        assert await waiting[1].response(perf_counter() - 4.8) == (None, "timeout")
        assert not processes.ingress.wait_for(sent(log=processes.log, order=3, age=6.0))
        for each in waiting:
            each.close()
        assert not processes.ingress._waiting


async def test_who_sends_an_event_again_gets_the_response_too() -> None:
    """It is delivered once, with `dedupe`: whichever of its senders it came from."""
    async with fleet() as processes:
        waiting = [expected(processes.ingress), expected(processes.ingress)]
        processes.router.take(sent(log=processes.log, age=3.0), FINE)
        assert [await each.response(perf_counter()) for each in waiting] == [(FINE, "sent")] * 2


async def test_a_response_that_does_not_tell_for_which_content_is_nobodys() -> None:
    """Written by a version that told events apart by their ids."""
    async with fleet() as processes:
        waiting, log = expected(processes.ingress), processes.log
        former = [(name, value) for name, value in fine(an_order()) if name != "gw_content"]
        await log.append(TOPICS.responses, key=b"evt_1", value=b"of another", headers=former)
        await log.append(TOPICS.responses, key=b"evt_1", value=b"fine", headers=fine(an_order()))
        assert await waiting.response(perf_counter()) == (FINE, "sent")
        assert processes.metrics.records_undecodable.labels("responses").value == 0


async def test_a_process_that_starts_reads_what_somebody_may_still_wait_for() -> None:
    current, clock = [some_rules()], [1000.0]
    async with fleet(lambda: current[0], now=lambda: clock[0]) as processes:
        log = processes.log
        for number in range(100):
            headers = encode_response(ResponseTo(EventId(f"evt_{number}"), fingerprint(an_order()), "chat"), None)
            await log.append(TOPICS.responses, key=b"evt_%d" % number, value=b"", headers=headers)
        clock[0] += LOOK_BACK + 1.0
        waiting = expected(processes.ingress)
        await log.append(TOPICS.responses, key=b"evt_1", value=b"fine", headers=fine(an_order()))
        current[0] = waiting_rules()
        assert await waiting.response(perf_counter()) == (FINE, "sent")


async def test_a_process_with_other_rules_passes_nothing_on_for_another_destination() -> None:
    """The one with the senders has newer rules, say: they wait for another destination than the router knows."""
    async with fleet() as processes:
        waiting = expected(processes.ingress, "audit", timeout=0.3)
        processes.router.take(sent(log=processes.log), FINE)
        assert await waiting.response(perf_counter()) == (None, "timeout")


async def test_responses_are_followed_once_a_reload_asks_for_them() -> None:
    current = [some_rules()]
    async with fleet(lambda: current[0]) as processes:
        assert not processes.router.wait_for(sent(log=processes.log))
        current[0] = waiting_rules()
        waiting, request = expected(processes.ingress), sent(log=processes.log)
        assert processes.router.wait_for(request)
        processes.router.take(request, FINE)
        assert await waiting.response(perf_counter()) == (FINE, "sent")


async def test_only_what_a_sender_may_wait_for_is_read_and_passed_on() -> None:
    async with fleet() as processes:
        router, log = processes.router, processes.log
        assert router.wait_for(sent(log=log, age=4.9))
        assert not router.wait_for(sent(log=log, age=5.1)), "a retry hours later is of no interest"
        assert not router.wait_for(sent(log=log, destination="audit"))
        assert not router.wait_for(Sent(None))
        other = Sent(a_delivery(event=an_event(source="stripe", received_at=log.now()), destination="chat"))
        assert not router.wait_for(other)
    async with fleet(is_shared=False) as alone:
        assert not alone.router.wait_for(sent(log=alone.log))


async def test_a_record_that_no_version_wrote_stops_nobody() -> None:
    async with fleet() as processes:
        waiting = expected(processes.ingress)
        for headers in ([], [("gw_v", b"1"), ("gw_status", b"7")], [("gw_v", b"2")]):
            await processes.log.append(TOPICS.responses, key=b"evt_1", value=b"forged", headers=headers)
        await processes.log.append(TOPICS.responses, key=b"evt_1", value=b"fine", headers=fine(an_order()))
        assert await waiting.response(perf_counter()) == (FINE, "sent")
        counted = processes.metrics.records_undecodable.labels("responses").value
        assert counted == 2, "one is in a newer format, for which nobody waits"


async def test_a_log_that_takes_no_response_costs_the_response_alone() -> None:
    async with fleet() as processes:
        waiting, request = expected(processes.ingress), sent(log=processes.log)
        processes.log.fail_appends(1)
        processes.router.take(request, FINE)
        assert await waiting.response(perf_counter() - 4.8) == (None, "timeout")
        assert not processes.router._appends


async def test_so_many_senders_wait_and_no_more() -> None:
    async with fleet() as processes:
        here = processes.ingress
        assert MAX_WAITING == 4000
        most = MAX_WAITING // 2
        waiting = [here.expect(an_order(f"evt_{number}"), CHAT) for number in range(most)]
        assert None not in waiting
        assert here.expect(an_order("evt_x"), CHAT) is None
        assert waiting[0] is not None
        waiting[0].close()
        assert here.expect(an_order("evt_x"), CHAT) is not None


async def test_a_source_whose_destination_hangs_leaves_places_to_the_others() -> None:
    async with fleet() as processes:
        here, number = processes.ingress, 0
        while here.expect(an_order(f"evt_{number}"), CHAT) is not None:
            number += 1
        others = [here.expect(an_order(f"evt_o{each}", source="stripe"), CHAT) for each in range(MAX_WAITING // 4)]
        assert None not in others


async def test_responses_that_a_slow_log_holds_up_leave_places_to_those_of_other_sources() -> None:
    current = waiting_rules()
    after = StoredResponse(after_delivery=CHAT)
    both = {name: replace(current.sources[name], response=after) for name in ("github", "stripe")}
    async with fleet(lambda: replace(current, sources={**current.sources, **both})) as processes:
        log, router = processes.log, processes.router
        for _ in range(2 * MAX_APPENDS):
            router.take(sent(log=log), FINE)
        assert len(router._appends) == MAX_APPENDS // 2
        event = an_event(id="evt_2", source="stripe", received_at=log.now())
        router.take(Sent(a_delivery(event=event, destination="chat")), FINE)
        assert len(router._appends) == MAX_APPENDS // 2 + 1
        await asyncio.wait(router._appends)
        assert not router._append_places._debts


async def test_a_process_that_stops_lets_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ingress.destination_responses.DRAIN", 0.05)
    async with fleet() as processes:
        waiting = expected(processes.ingress)
        processes.ingress.stop()
        late = expected(processes.ingress)
        assert await late.response(perf_counter()) == (None, "failed")
        assert await waiting.response(perf_counter()) == (None, "failed")


@pytest.mark.parametrize("status", [100, 301, 401, 403, 407, 408, 425, 429, 500, 503])
def test_what_a_destination_has_against_the_gateway_is_no_response_for_a_sender(status: int) -> None:
    assert for_sender(DestinationResponse(status=status)) is None


@pytest.mark.parametrize("status", [200, 201, 204, 299, 400, 404, 409, 410, 422])
def test_what_a_destination_says_of_the_event_is_passed_on(status: int) -> None:
    response = DestinationResponse(status=status)
    assert for_sender(response) is response
