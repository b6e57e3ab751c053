"""Refused requests are verified again: what passes is admitted once, whatever happens in the middle of it."""

import asyncio
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typing_extensions import override

from gateway.log.base import Partition, Position, RecordHeaders
from gateway.log.records import decode_event, encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import (
    SUCCESSOR_HEADROOM,
    Event,
    LogUnavailableError,
    RecordTooLargeError,
    RefusedError,
    UnfetchedError,
    UsageError,
)
from gateway.ops.rejected import (
    Rejected,
    RejectedFilter,
    RejectedGroups,
    find_rejected,
    read_rejected,
    refuse_open,
    shown_body,
    shown_headers,
    shown_query,
)
from gateway.ops.rejected_retry import RejectedCommand, Report, text_of
from gateway.quarantine.claims import LEASE
from gateway.quarantine.records import Missing, RejectedRequest, RequestOutcome, encode_rejected, key_of
from gateway.rules.event_builder import EventBuilder
from gateway.rules.expressions import Expression
from gateway.rules.rules import Source
from gateway.verify.client_certificates import ClientCertificates, read_authorities
from gateway.verify.kept_proof import conceal, is_body_secret
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier
from tests.builders import NOW
from tests.certificates import Authority
from tests.memory_log import MemoryLog

TOPICS = Topics()
SALT = b"0123456789abcdef"
OLD, NEW = "an old secret of more than 32 bytes", "a new secret of more than 32 bytes"
EVERYTHING = RejectedFilter()
BY_FETCHED_KEY = {
    "scheme": "public-key",
    "algorithm": "ed25519",
    "header": "X-Sig",
    "encoding": "hex",
    "signed": "{body}",
    "key_url": {"header": "X-Key", "hosts": ["keys.example.com"], "path": "/v1/"},
}
PLAID = build_verifier({"scheme": "plaid", "client_id": "5f1b", "api_secret": "hush-hush-hush-hush"})
for _scheme in ("github", "stripe", "slack"):  # their files are read here, and not in the event loop
    build_verifier({"scheme": _scheme, "secrets": [OLD]})


class Killed(BaseException):
    """What ends a process in the middle of something."""


class Killable(MemoryLog):
    """A log whose user is killed at an append: before it has taken effect, or after."""

    kill_at = -1
    is_stored = False
    is_dead = False
    largest_event = 1 << 20

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if self.is_dead:
            raise Killed
        if topic == TOPICS.events("shop") and len(value) > self.largest_event:
            raise RecordTooLargeError(topic)
        self.kill_at -= 1
        if self.kill_at == 0:
            self.is_dead = True
            if self.is_stored:
                await super().append(topic, key=key, value=value, headers=headers, partition=partition)
            raise Killed
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


class World:
    """A log with refused requests, and a clock."""

    def __init__(self, scheme: dict[str, Any] | None = None, **fields: Any) -> None:
        self.at = NOW
        self.scheme = scheme or {"scheme": "github"}
        self.fields = fields
        self.log = Killable(now=lambda: self.at)

    async def start(self) -> "World":
        await self.log.create(TOPICS.specs([TOPICS.events("shop")], has_quarantine=True))
        return self

    def source(self, secret: str = NEW, **fields: Any) -> Source:
        verifier = build_verifier({**self.scheme, "secrets": [secret]})
        return Source(name="shop", path="/in/shop", verifier=verifier, **{**self.fields, **fields})

    def request(self, number: int, *, secret: str = NEW, at: float | None = None, body: bytes | None = None) -> Request:
        verifier = self.source(secret).verifier
        body = b'{"id":"e%d"}' % number if body is None else body
        pairs = verifier.sign(body, now=at or self.at, id=f"d{number}", type="ping", headers={})
        headers = tuple([(name.encode(), value.encode()) for name, value in pairs])
        return Request("POST", "/in/shop", verifier.signed_query(now=self.at), headers, body)

    async def refuse(
        self,
        *requests: Request,
        missing: Missing = Missing.NOTHING,
        address: str = "203.0.113.7",
        certificate: str = "",
    ) -> None:
        """Keep requests as the ingress does that has the old secret."""
        old = self.source(OLD)
        for request in requests:
            kept = conceal(old.verifier, request, SALT)
            rejected = RejectedRequest(
                source="shop",
                reason="bad_signature",
                at=self.at,
                address=address,
                method="POST",
                path="/in/***",
                query=kept.query,
                headers=kept.headers,
                body=request.body,
                size=len(request.body) if missing is not Missing.BODY else 10**7,
                missing=missing,
                salt=SALT,
                credentials=kept.credentials,
                is_body_secret=is_body_secret(old.verifier),
                certificate=certificate,
            )
            headers = encode_rejected(rejected)
            await self.log.append(TOPICS.rejected, key=key_of("shop"), value=request.body, headers=headers)
            self.at += 1

    async def accept(self, request: Request) -> Event:
        """Store a request's event as the ingress does that has the new secret."""
        source = self.source()
        verified = source.verifier.verify(request, now=self.at)
        event = EventBuilder(source).event(request, received_at=self.at, identity_expression=verified.identity)
        await self.log.append(
            TOPICS.events("shop"), key=event_key(event), value=event.body, headers=encode_event(event)
        )
        return event

    def command(self, *, wait: float = 2 * LEASE) -> RejectedCommand:
        async def sleep(seconds: float) -> None:
            self.at += seconds
            await asyncio.sleep(0)

        return RejectedCommand(self.log, TOPICS, wait=wait, clock=lambda: self.at, sleep=sleep)

    async def retry(self, which: RejectedFilter = EVERYTHING, **more: Any) -> Report:
        source = more.pop("source", None) or self.source()
        return await self.command().retry(source, which, **more)

    async def events(self) -> list[Event]:
        found = []
        for number, (start, end) in (await self.log.bounds(TOPICS.events("shop"))).items():
            async for records in self.log.scan(Partition(TOPICS.events("shop"), number), start, end):
                found += [(record.appended_at, decode_event(record)) for record in records]
        return [event for _, event in sorted(found, key=lambda each: each[0])]

    async def rejected(self, which: RejectedFilter = EVERYTHING, *, all_: bool = False) -> list[Rejected]:
        return [each async for each in read_rejected(self.log, TOPICS, which, include_resolved=all_)]


@pytest.fixture
async def world() -> World:
    return await World().start()


def bodies(events: Collection[Event]) -> Counter[bytes]:
    return Counter([event.body for event in events])


async def test_each_request_that_passes_now_becomes_the_event_that_the_ingress_would_have_made(world: World) -> None:
    requests = [world.request(number) for number in range(3)]
    await world.refuse(*requests)
    world.at += 3600
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 3}
    assert (report.events, report.is_complete) == (3, True)
    events = await world.events()
    assert bodies(events) == Counter([request.body for request in requests])
    for event in events:
        assert event.received_at >= NOW + 3600, "its age counts from now on"
        like = EventBuilder(world.source()).event(
            next(request for request in requests if request.body == event.body), received_at=event.received_at
        )
        assert event == like
    assert [each.outcome for each in await world.rejected(all_=True)] == [RequestOutcome.ADMITTED] * 3
    assert await world.rejected() == []


async def test_a_report_is_exact(world: World) -> None:
    await world.refuse(*[world.request(number) for number in range(12)])
    await world.refuse(*[world.request(number, secret="forged" * 8) for number in range(20, 23)])
    await world.refuse(world.request(30), missing=Missing.BODY)
    await world.refuse(world.request(31), missing=Missing.CREDENTIAL)
    report = await world.retry()
    assert text_of(report) == (
        "12 admitted, 3 still refused (bad_signature), 1 too large to keep whole, 1 with a credential too short to keep"
    )
    again = await world.retry()
    assert text_of(again) == (
        "3 still refused (bad_signature), 1 too large to keep whole, 1 with a credential too short to keep"
    )
    assert len(await world.events()) == 12
    assert text_of(await world.command().drop(EVERYTHING)) == "5 dropped"
    assert text_of(await world.retry()) == "no open refused requests"


async def test_what_the_provider_has_sent_again_meanwhile_is_not_admitted(world: World) -> None:
    requests = [world.request(number) for number in range(4)]
    await world.refuse(*requests)
    await world.accept(requests[1])
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 3, RequestOutcome.PRESENT: 1}
    assert bodies(await world.events()) == Counter([request.body for request in requests])


async def test_what_was_accepted_before_within_the_dedupe_window_is_not_admitted() -> None:
    world = await World(dedupe=3600.0).start()
    await world.accept(world.request(1))
    world.at += 1800
    await world.refuse(world.request(1))
    world.at += 90_000  # far beyond the window, in which the router would have told it
    assert (await world.retry()).outcomes == {RequestOutcome.PRESENT: 1}


async def test_one_event_that_was_refused_several_times_is_admitted_once(world: World) -> None:
    await world.refuse(*[world.request(1)] * 5, world.request(2))
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 2, RequestOutcome.PRESENT: 4}
    assert len(await world.events()) == 2


async def test_other_content_under_the_same_identity_is_another_event(world: World) -> None:
    await world.refuse(world.request(1), world.request(1, body=b'{"id":"other"}'))
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 2}


async def test_requests_without_an_identity_are_admitted_once_each() -> None:
    world = await World({"scheme": "hmac", "header": "X-Sig", "algorithm": "sha256", "encoding": "hex"}).start()
    same = world.request(0, body=b"{}")
    await world.refuse(*[world.request(number) for number in range(5)], same, same)
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 7}
    events = await world.events()
    assert len({event.id for event in events}) == 7


async def test_the_events_of_a_key_are_admitted_in_the_order_in_which_they_came() -> None:
    world = await World(key=Expression("body.account")).start()
    sent = [world.request(number, body=b'{"account":"a","n":%d}' % number) for number in range(250)]
    await world.refuse(*sent)
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 250}
    assert [event.body for event in await world.events()] == [request.body for request in sent]


async def test_the_timestamp_is_judged_as_of_the_receipt() -> None:
    world = await World({"scheme": "stripe"}).start()
    stale = world.request(1, at=world.at - 301)
    await world.refuse(world.request(0), stale)
    world.at += 5 * 86400
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 1}
    assert report.refused == {"stale_timestamp": 1}


async def test_an_hour_of_a_missed_rotation_is_admitted_though_its_timestamps_are_too_old_by_now() -> None:
    """A request a minute, each beside a forged one, and all of them old when an operator comes to it."""
    world = await World({"scheme": "stripe"}).start()
    for minute in range(60):
        world.at = NOW + 60 * minute
        await world.refuse(world.request(minute), world.request(1000 + minute, secret="nobody's, of 32 bytes or more"))
    world.at += 3600
    assert (await world.retry(dry_run=True)).outcomes == {RequestOutcome.ADMITTED: 60}
    report = await world.retry()
    assert (report.outcomes, report.refused) == ({RequestOutcome.ADMITTED: 60}, {"bad_signature": 60})
    assert bodies(await world.events()) == Counter([b'{"id":"e%d"}' % minute for minute in range(60)])
    assert (await world.retry()).outcomes == {}
    with pytest.raises(RefusedError, match="stale_timestamp"):
        world.source().verifier.verify(world.request(1, at=NOW), now=world.at)


async def test_a_secret_that_has_ended_since_verifies_nothing(world: World) -> None:
    await world.refuse(world.request(1))
    world.at += 7200
    ended = build_verifier({"scheme": "github", "secrets": [{"secret": NEW, "until": "2023-11-14T23:00:00Z"}]})
    assert NOW < ended.lifetimes[0].until < world.at
    report = await world.retry(source=replace(world.source(), verifier=ended))
    assert report.refused == {"bad_signature": 1}
    assert await world.events() == []


async def test_a_request_from_an_address_that_is_not_allowed_any_more_stays_refused(world: World) -> None:
    for number, address in enumerate(("203.0.113.66", "192.0.2.9", "", "2001:db8::1", "anything")):
        await world.refuse(world.request(number), address=address)
    allowed = replace(world.source(), allow_from=(ip_network("192.0.2.0/24"),))
    report = await world.retry(source=allowed)
    assert (report.outcomes, report.refused) == ({RequestOutcome.ADMITTED: 1}, {"address_refused": 4})
    assert bodies(await world.events()) == Counter([b'{"id":"e1"}'])
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 4}


async def test_a_request_whose_certificate_met_another_demand_than_todays_stays_refused(world: World) -> None:
    authority = read_authorities(Authority("bank").pem)
    demands = [
        ClientCertificates(authorities=authority),
        ClientCertificates(authorities=authority, dns=frozenset({"a.example"})),
        ClientCertificates(authorities=authority, uris=frozenset({"a.example"})),
        ClientCertificates(authorities=read_authorities(Authority("other").pem)),
    ]
    for number, certificate in enumerate(("", *[each.digest for each in demands])):
        await world.refuse(world.request(number), certificate=certificate)
    today = ClientCertificates(authorities=authority, dns=frozenset({"a.example"}))
    report = await world.retry(source=replace(world.source(), client_certificate=today))
    assert (report.outcomes, report.refused) == ({RequestOutcome.ADMITTED: 1}, {"client_certificate_unknown": 4})
    assert bodies(await world.events()) == Counter([b'{"id":"e2"}'])
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 4}


@pytest.mark.parametrize(
    "scheme",
    [
        {"scheme": "bearer"},
        {"scheme": "basic", "username": "hooks"},
        {"scheme": "token", "query": "key"},
        {"scheme": "token", "header": "X-Token"},
    ],
)
async def test_a_credential_is_recognised_and_is_in_no_record(scheme: dict[str, Any]) -> None:
    world = await World(scheme, id=Expression("body.id")).start()
    await world.refuse(world.request(1), world.request(2, secret="nobody's secret, but a long one"))
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 1}
    assert report.refused == {"bad_credentials": 1}
    [event] = await world.events()
    assert event.query == ""
    assert not {name.lower() for name, _ in event.headers} & {b"authorization", b"x-token"}
    for each in await world.rejected(all_=True):
        assert NEW.encode() not in repr(each.record).encode()


async def test_a_handshake_is_no_event() -> None:
    world = await World({"scheme": "slack"}).start()
    await world.refuse(world.request(1, body=b'{"type":"url_verification","challenge":"c"}'))
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.HANDSHAKE: 1}
    assert await world.events() == []
    assert await world.rejected() == []


async def test_a_batch_is_split_and_each_of_its_events_is_admitted_once() -> None:
    world = await World(split=(), id=Expression("body.id")).start()
    batch = world.request(1, body=b'[{"id":"a"},{"id":"b"},{"id":"c"}]')
    await world.refuse(batch, world.request(2, body=b"[]"))
    world.log.kill_at = 5  # the audit record, the claim, and two of the events
    with pytest.raises(Killed):
        await world.retry()
    world.log.is_dead = False
    assert len(await world.events()) == 2
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 2}
    assert (report.events, report.refused) == (1, {})
    assert bodies(await world.events()) == Counter([b'{"id":"a"}', b'{"id":"b"}', b'{"id":"c"}'])


async def test_a_compressed_batch_is_split_as_it_would_have_been_and_a_damaged_one_is_refused() -> None:
    world = await World(split=(), id=Expression("body.id")).start()
    packed = gzip.compress(b'[{"id":"a"},{"id":"b"}]')
    coding = (b"Content-Encoding", b"gzip")
    requests = [world.request(number, body=body) for number, body in enumerate((packed, packed[:-1]))]
    await world.refuse(*[each._replace(headers=(*each.headers, coding)) for each in requests])
    report = await world.retry()
    assert (report.outcomes, report.refused) == ({RequestOutcome.ADMITTED: 1}, {"malformed_content": 1})
    assert bodies(await world.events()) == Counter([b'{"id":"a"}', b'{"id":"b"}'])


@pytest.mark.parametrize("is_stored", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("has_identity", [False, True])
async def test_a_kill_at_any_append_loses_nothing_and_repeats_nothing(*, is_stored: bool, has_identity: bool) -> None:
    hashed = {"scheme": "hmac", "header": "X-Sig", "algorithm": "sha256", "encoding": "hex"}
    kills = 0
    sent: list[Request] = []
    for kill_at in range(1, 100):
        world = await World({"scheme": "github"} if has_identity else hashed).start()
        requests = [world.request(number) for number in range(250)]
        await world.refuse(*requests[:3], *requests[3::40])
        sent = [*requests[:3], *requests[3::40]]
        await world.refuse(world.request(999, secret="forged" * 8))
        world.log.kill_at, world.log.is_stored = kill_at, is_stored
        try:
            first = await world.retry()
        except Killed:
            kills += 1
            world.log.is_dead = False
            report = await world.retry()
            assert report.is_complete
            assert report.outcomes.total() + report.elsewhere <= len(sent)
        else:
            assert first.outcomes == {RequestOutcome.ADMITTED: len(sent)}
        assert bodies(await world.events()) == Counter([request.body for request in sent]), kill_at
        assert [each.reason for each in await world.rejected()] == ["bad_signature"], "the forged one"
        assert (await world.retry()).outcomes == {}
        if world.log.kill_at > 0:
            break
    assert kills == len(sent) + 5, "the audit record, the claim, each event, the outcomes, the end, what came of it"


async def test_of_two_retries_at_once_each_request_is_admitted_by_one(world: World) -> None:
    class Remote(Killable):
        """One that others use between two of its answers."""

        @override
        async def append(self, topic: str, **record: Any) -> Position:
            await asyncio.sleep(0)
            return await super().append(topic, **record)

        @override
        async def bounds(self, topic: str) -> Any:
            await asyncio.sleep(0)
            return await super().bounds(topic)

    world.log = Remote(now=lambda: world.at)
    await world.start()
    sent = [world.request(number) for number in range(350)]
    await world.refuse(*sent)
    reports = await asyncio.gather(*[world.retry() for _ in range(3)])
    assert bodies(await world.events()) == Counter([request.body for request in sent])
    assert sum(report.outcomes[RequestOutcome.ADMITTED] for report in reports) == 350
    for report in reports:
        assert (
            report.outcomes[RequestOutcome.ADMITTED] + report.elsewhere + report.outcomes[RequestOutcome.PRESENT] == 350
        )
        assert report.is_complete


async def test_a_retry_that_does_not_wait_long_enough_says_who_is_at_it(world: World) -> None:
    await world.refuse(world.request(1))
    world.log.kill_at = 3  # after the audit record and the claim
    with pytest.raises(Killed):
        await world.retry()
    world.log.is_dead = False
    report = await world.command(wait=5).retry(world.source(), EVERYTHING)
    assert report.left == 1
    assert "a command of" in report.problem
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 1}


@pytest.mark.parametrize("skew", [3600.0, -3600.0])
async def test_a_command_whose_clock_is_wrong_takes_no_partition_from_another(world: World, skew: float) -> None:
    class Skewed(Killable):
        """Its time is this machine's until the first append is acknowledged."""

        skew = 0.0

        @override
        async def append(self, topic: str, **record: Any) -> Position:
            self.skew = 0.0
            return await super().append(topic, **record)

        @override
        def now(self) -> float:
            return super().now() + self.skew

    world.log = log = Skewed(now=lambda: world.at)
    await world.start()
    await world.refuse(world.request(1))
    log.kill_at = 3  # after the audit record and the claim
    with pytest.raises(Killed):
        await world.retry()
    log.is_dead, log.skew = False, skew
    report = await world.command(wait=5).retry(world.source(), EVERYTHING)
    assert (report.left, report.outcomes.total()) == (1, 0)
    log.skew = skew
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 1}


async def test_a_log_that_fails_in_the_middle_is_reported_and_the_next_retry_does_the_rest(world: World) -> None:
    class Failing(Killable):
        failing: int = 0

        @override
        async def append(self, topic: str, **record: Any) -> Position:
            if topic == TOPICS.events("shop"):
                self.failing -= 1
                if self.failing == 0:
                    raise LogUnavailableError("no leader")
            return await super().append(topic, **record)

    world.log = log = Failing(now=lambda: world.at)
    await world.start()
    sent = [world.request(number) for number in range(10)]
    await world.refuse(*sent, sent[4])
    log.failing = 5
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 9}
    assert (report.left, report.problem, report.is_complete) == (2, "no leader", False)
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 1, RequestOutcome.PRESENT: 1}
    assert bodies(await world.events()) == Counter([request.body for request in sent])


async def test_a_log_that_is_slower_than_the_claim_lasts_appends_no_event_twice(world: World) -> None:
    class Slow(Killable):
        is_slow = False

        @override
        async def bounds(self, topic: str) -> Any:
            if self.is_slow and topic == TOPICS.events("shop"):
                world.at += LEASE
            return await super().bounds(topic)

    world.log = log = Slow(now=lambda: world.at)
    await world.start()
    await world.refuse(world.request(1))
    log.is_slow = True
    report = await world.retry()
    assert (report.left, report.outcomes.total()) == (1, 0)
    assert "too slow" in report.problem
    assert await world.events() == []
    log.is_slow = False
    assert (await world.retry()).outcomes == {RequestOutcome.ADMITTED: 1}


async def test_a_dry_run_says_what_would_be_admitted_and_appends_nothing(world: World) -> None:
    requests = [world.request(number) for number in range(3)]
    await world.refuse(*requests, requests[0])
    await world.accept(requests[2])
    before = await world.log.bounds(TOPICS.rejected)
    report = await world.retry(dry_run=True)
    assert text_of(report, is_dry=True) == "2 would be admitted, 2 already in the log"
    assert len(await world.events()) == 1
    assert await world.log.bounds(TOPICS.rejected) == before


async def test_filters_choose_what_is_retried(world: World) -> None:
    await world.refuse(*[world.request(number) for number in range(6)])
    assert (await world.retry(RejectedFilter(reason="bad_credentials"))).outcomes == {}
    newest, *_ = await world.rejected()
    assert (await world.retry(RejectedFilter(positions=(newest.position,)))).outcomes == {RequestOutcome.ADMITTED: 1}
    assert (await world.retry(RejectedFilter(since=NOW + 3))).outcomes == {RequestOutcome.ADMITTED: 2}
    assert (await world.retry(RejectedFilter(until=NOW))).outcomes == {RequestOutcome.ADMITTED: 1}
    assert len(await world.events()) == 4


async def test_unknown_records_are_listed_set_aside_and_dropped(world: World) -> None:
    await world.refuse(world.request(1))
    headers = [("gw_v", b"7"), ("gw_rejected", b"{}")]
    await world.log.append(TOPICS.rejected, key=b"shop", value=b"", headers=headers)
    await world.log.append(TOPICS.rejected, key=b"shop", value=b"?", headers=[])
    report = await world.retry()
    assert text_of(report) == "1 admitted, 2 unreadable"
    groups = RejectedGroups()
    for each in await world.rejected():
        groups.add(each)
    assert [(group.source, group.reason, group.count) for group in groups.largest_first()] == [
        ("shop", "unreadable", 2)
    ]
    problems = sorted([each.problem for each in await world.rejected()])
    assert ["newer version" in problem for problem in problems] == [False, True]
    assert (await world.command().drop(EVERYTHING)).outcomes == {RequestOutcome.DROPPED: 2}
    assert await world.rejected() == []


async def test_requests_are_listed_by_source_and_reason_with_their_times(world: World) -> None:
    await world.refuse(*[world.request(number) for number in range(3)], missing=Missing.BODY)
    groups = RejectedGroups()
    for each in await world.rejected():
        groups.add(each)
    [group] = groups.largest_first()
    assert (group.source, group.reason, group.count) == ("shop", "bad_signature", 3)
    assert (group.oldest, group.newest, group.missing) == (NOW, NOW + 2, {Missing.BODY: 3})
    found = await find_rejected(world.log, TOPICS, (await world.rejected())[0].position)
    assert found is not None
    assert found.record.appended_at == NOW + 2


async def test_a_partition_that_cannot_be_read_is_reported_and_stops_no_other(world: World) -> None:
    await world.refuse(world.request(1))
    [found] = await world.rejected()
    other = Partition(TOPICS.rejected, (found.partition.number + 1) % 4)
    world.log.lose_leader(other)
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 1}
    assert (report.problem, report.is_complete) == (f"{TOPICS.rejected}/{other.number}: not read: no leader", False)


async def test_a_log_with_open_requests_is_not_moved(world: World) -> None:
    await refuse_open(world.log, TOPICS)
    await world.refuse(world.request(1))
    with pytest.raises(UsageError, match=r"gateway\.rejected: expected no open refused requests"):
        await refuse_open(world.log, TOPICS)
    await world.command().drop(EVERYTHING)
    await refuse_open(world.log, TOPICS)


async def test_credentials_are_not_shown() -> None:
    world = await World({"scheme": "token", "field": "token"}, id=Expression("body.id")).start()
    body = json.dumps({"id": 1, "token": NEW}).encode()
    headers = ((b"X-Api-Key", b"k3y"), (b"X-Session-Id", b"s3ssion"), (b"X-Team", b"blue"))
    await world.refuse(Request("POST", "/in/shop", "a=1&access_token=t0ken&b", headers, body))
    [found] = await world.rejected()
    assert found.request is not None
    assert shown_body(found.request) is None
    assert shown_query(found.request) == "a=***&access_token=***&b"
    assert shown_headers(found.request) == [(b"X-Api-Key", b"***"), (b"X-Session-Id", b"***"), (b"X-Team", b"blue")]


async def test_a_key_that_a_request_names_is_fetched_once(world: World) -> None:
    key = Ed25519PrivateKey.generate()
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    verifier = build_verifier(BY_FETCHED_KEY)
    source = Source(name="shop", path="/in/shop", verifier=verifier, id=Expression("body.id"))
    asked: list[str] = []

    async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
        assert not request_body
        asked.append(url)
        assert timeout < 60
        assert limit < 1 << 20
        if url.endswith("gone"):
            raise UnfetchedError("404")
        return pem

    def signed(number: int, name: str) -> Request:
        body = b'{"id":%d}' % number
        headers = (
            (b"X-Sig", key.sign(body).hex().encode()),
            (b"X-Key", f"https://keys.example.com/v1/{name}".encode()),
        )
        return Request("POST", "/in/shop", "", headers, body)

    await world.refuse(signed(1, "a"), signed(2, "a"), signed(3, "gone"))
    report = await world.retry(source=source, fetch=fetch)
    assert report.outcomes == {RequestOutcome.ADMITTED: 2}
    assert report.refused == {"key_unavailable": 1}
    assert asked.count("https://keys.example.com/v1/a") == 1
    with pytest.raises(RefusedError):
        verifier.check_head(Request("POST", "/", "", (), b""), now=NOW)


async def test_addresses_that_cannot_be_fetched_are_tried_once_and_only_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends requests may name any on an allowed host, and each may take as long as a fetch may."""
    verifier = build_verifier(BY_FETCHED_KEY)
    source = Source(name="shop", path="/in/shop", verifier=verifier)
    asked: Counter[str] = Counter()

    async def fetch(url: str, **_: object) -> bytes:
        asked[url] += 1
        await asyncio.sleep(0.02)
        raise UnfetchedError("timeout")

    monkeypatch.setattr("gateway.ops.rejected_verification.MAX_FAILING", 0.1)
    names = [*range(20), 0, 0]
    pairs = [((b"X-Sig", b"00" * 64), (b"X-Key", b"https://keys.example.com/v1/%d" % name)) for name in names]
    await world.refuse(*[Request("POST", "/in/shop", "", headers, b"{}") for headers in pairs])
    report = await world.retry(source=source, fetch=fetch)
    assert report.refused == {"key_unavailable": len(names)}
    assert 1 <= len(asked) <= 6
    assert set(asked.values()) == {1}


@pytest.mark.parametrize("limited", ["log", "topic"])
async def test_what_is_too_large_is_neither_stored_nor_said_to_be(limited: str) -> None:
    """Of a request with several events none is, as at the ingress; a topic's own limit shows only in its refusal."""
    world = await World(split=("records",), id=Expression("body.id")).start()
    large, other = [b'{"id":"%b","text":"%b"}' % (name, b"x" * 60_000) for name in (b"large", b"other")]
    batch = b'{"records":[{"id":"small"},{"id":"early"},%b]}' % other
    early = await world.accept(world.request(9, body=b'{"id":"early"}'))
    copies = [world.request(0, body=large) for _ in range(3)]
    good = world.request(1)
    await world.refuse(*copies, world.request(2, body=batch), good, world.request(3, body=early.body))
    if limited == "log":
        world.log.max_record_bytes = SUCCESSOR_HEADROOM + 50_000
    else:
        world.log.largest_event = 50_000
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 1, RequestOutcome.PRESENT: 1}
    assert report.refused == {"body_too_large": 4}
    partly = {b'{"id":"small"}': 1} if limited == "topic" else {}
    assert bodies(await world.events()) == {good.body: 1, early.body: 1} | partly
    world.log.max_record_bytes = 1 << 20
    world.log.largest_event = 1 << 20
    report = await world.retry()
    assert report.outcomes == {RequestOutcome.ADMITTED: 2, RequestOutcome.PRESENT: 2}
    assert bodies(await world.events()) == {good.body: 1, early.body: 1, large: 1, other: 1, b'{"id":"small"}': 1}


async def test_plaid_is_asked_again_for_the_key_of_a_refused_token(world: World) -> None:
    """With the credentials of today's rules, by a POST as for any other token."""
    source = Source(name="shop", path="/in/shop", verifier=PLAID, id=Expression("body.id"))
    key = ec.derive_private_key(11, ec.SECP256R1())
    body = b'{"id":1}'
    claims = {"iat": int(NOW), "request_body_sha256": hashlib.sha256(body).hexdigest()}
    token = jwt.encode(claims, key, algorithm="ES256", headers={"kid": "k-1"})
    entry = orjson.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    asked: list[tuple[str, Any]] = []

    async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:  # noqa: ARG001 - as it is
        asked.append((url, orjson.loads(request_body)))
        return orjson.dumps({"key": {**entry, "kid": "k-1", "expired_at": None}})

    await world.refuse(Request("POST", "/in/shop", "", ((b"Plaid-Verification", token.encode()),), body))
    report = await world.retry(source=source, fetch=fetch)
    assert report.outcomes == {RequestOutcome.ADMITTED: 1}
    expected = {"client_id": "5f1b", "secret": "hush-hush-hush-hush", "key_id": "k-1"}
    assert asked == [("https://production.plaid.com/webhook_verification_key/get#k-1", expected)]
