"""A gateway as it is on a day when not all is well: what the pages are looked at with."""

import random
from typing import Any

from gateway.engine.control.records import ControlRecord
from gateway.engine.delivery.holds import Hold
from gateway.log.attempt_records import Decision
from gateway.log.base import Partition, TopicSpec
from gateway.log.records import encode_delivery
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import Attempt, Event, RecordMetadata, ResponseExcerpt, Result, SpillReason
from tests.builders import a_delivery, an_attempt
from tests.index.company import DAY, Company, Silent
from tests.memory_log import MemoryLog

NOW = 1_796_133_600.0
"""2026-12-01 14:00 UTC: when the pages are looked at."""
RULES = """
version: 1
sources:
  github:
    path: /github
    owner: platform
    runbook: https://wiki.example/github
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
  shopify:
    path: /shopify
    owner: shop
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
  stripe:
    path: /stripe
    owner: payments
    dedupe: 3d
    type: body.type
    key: body.customer
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
destinations:
  chat: {url: "https://chat.example/hooks/secret", rate: 1/s, owner: platform}
  ci: {url: "https://ci.example/hooks/secret", owner: platform, runbook: https://wiki.example/ci}
  crm: {url: "https://crm.example/", owner: sales, timeout: 5s}
  ledger: {url: "https://ledger.example/", owner: payments, rate: 10/s}
  warehouse: {url: "https://warehouse.example/in", owner: shop}
routes:
  - {name: build-on-push, from: github, match: {type: push}, to: ci, owner: platform, runbook: https://wiki.example/ci}
  - {name: tell-the-team, from: [github, stripe], match: {type: [push, charge.failed]}, to: chat}
  - {name: book-charges, from: stripe, when: "body.amount > 0", to: ledger, order: key, owner: payments}
  - {name: pack-orders, from: shopify, match: {type: orders/create}, to: [warehouse, crm]}
"""
TYPES = {
    "github": ("push", "push", "pull_request", "issues"),
    "stripe": ("charge.succeeded", "charge.succeeded", "charge.failed", "customer.updated"),
    "shopify": ("orders/create", "orders/updated"),
}
ROUTES = {
    "push": (("build-on-push", "ci"), ("tell-the-team", "chat")),
    "charge.failed": (("book-charges", "ledger"), ("tell-the-team", "chat")),
    "charge.succeeded": (("book-charges", "ledger"),),
    "customer.updated": (("book-charges", "ledger"),),
    "orders/create": (("pack-orders", "warehouse"), ("pack-orders", "crm")),
}
FAILURE = b'{"error": "upstream connect error or disconnect/reset before headers", "code": 503, "retry": true}'


class Clock:
    """A clock that is set, and that never stands still."""

    def __init__(self) -> None:
        self.now = NOW - 86400.0

    def __call__(self) -> float:
        self.now += 0.002
        return self.now


def body_of(source: str, kind: str, number: int) -> dict[str, Any]:
    match source:
        case "github":
            return {
                "ref": "refs/heads/main",
                "after": f"{number * 2654435761 % (1 << 64):016x}{number:024x}",
                "repository": {"id": 1296269, "full_name": "acme/shop", "private": True},
                "pusher": {"name": "anna", "email": "anna@acme.example"},
                "commits": [{"message": "Totals are rounded once, at the end", "added": [], "modified": ["totals.py"]}],
            }
        case "stripe":
            return {
                "type": kind,
                "amount": 1200 + number * 37 % 9000,
                "currency": "eur",
                "customer": f"cus_{number % 40:03d}",
            }
        case _:
            return {"id": 4700 + number, "total_price": f"{20 + number % 80}.90", "currency": "EUR", "note": "Grüße 👋"}


async def furnish(company: Company, clock: Clock) -> dict[str, str]:
    """Fill a log with a day of traffic; return the ids of some of its events, by what is to be seen of them."""
    chance = random.Random(29)
    shown: dict[str, str] = {}
    for number in range(240):
        clock.now = max(clock.now, NOW - 86000.0 * (1 - number / 240) ** 2)
        source = chance.choice(tuple(TYPES))
        kind = chance.choice(TYPES[source])
        age = NOW - clock.now
        event, *_ = await company.event(
            source=source,
            type=kind,
            key=f"cus_{number % 40:03d}" if source == "stripe" else None,
            body=body_of(source, kind, number),
            headers={
                "Host": "hooks.acme.example",
                "User-Agent": f"{source.capitalize()}-Hooks/1.0",
                "Content-Type": "application/json",
                "X-Request-Id": f"{number:08x}-5f0c",
            },
        )
        for route, destination in ROUTES.get(kind, ()):
            name = await _deliver(company, clock, event, route, destination, age, chance)
            shown[name] = event.id
    for source in TYPES:
        topic = company.topics.events(source)
        for number, (_, end) in (await company.log.bounds(topic)).items():
            await company.commit(Partition(topic, number), end)
    await company.command(
        ControlRecord(kind="pause", name="destination/warehouse", state="paused", by="anna", at=NOW - 1800)
    )
    clock.now = NOW
    return shown


async def _deliver(  # noqa: PLR0917 - all that it depends on
    company: Company, clock: Clock, event: Event, route: str, destination: str, age: float, chance: random.Random
) -> str:
    clock.now += 0.02
    at = clock.now
    where: dict[str, Any] = {"route": route, "destination": destination}
    refused = ResponseExcerpt(body=FAILURE, headers=((b"Content-Type", b"application/json"), (b"Retry-After", b"1200")))
    if destination == "crm" and age < 3000:
        attempt = an_attempt(status=503, at=at, seconds=0.412, detail="503 Service Unavailable")
        await company.attempt(
            event,
            result=Result.SERVER_ERROR,
            status=503,
            decision=Decision.RETRY,
            response=refused,
            detail=attempt.detail,
            **where,
        )
        await _wait(company, event, attempt, at + 4500, where)
        return "waiting"
    if destination == "warehouse" and age < 1800:
        await company.park(event, "destination/warehouse", **where)
        return "parked"
    if destination == "ledger" and chance.random() < 0.08:
        tries: list[Attempt] = []
        for number in range(1, 5):
            tries.append(
                an_attempt(
                    number,
                    result=Result.CLIENT_ERROR,
                    status=422,
                    at=clock.now,
                    seconds=0.05,
                    detail="422 Unprocessable Entity",
                )
            )
            await company.attempt(
                event,
                number=number,
                result=Result.CLIENT_ERROR,
                status=422,
                decision=Decision.RETRY if number < 4 else Decision.DEAD_LETTER,
                response=ResponseExcerpt(body=b'{"error":"unknown customer"}'),
                **where,
            )
            clock.now += 5.0 * number
        await company.die(event, attempts=tuple(tries), **where)
        return "dead"
    await company.attempt(event, **where)
    return "delivered"


async def _wait(company: Company, event: Event, attempt: Attempt, due: float, where: dict[str, Any]) -> None:
    """Store a delivery that waits until a time, since its destination's breaker is open."""
    delivery = a_delivery(event=event, attempts=(attempt,), successor=1, due=due, **where)
    headers = encode_delivery(delivery, RecordMetadata(spill_reason=SpillReason.BREAKER_OPEN), at=company.log.now())
    topic = company.topics.retry("5h")
    await company.log.append(topic, key=delivery.destination.encode(), value=event.body, headers=headers)


HOLDS = {
    "crm": Hold(reason="breaker_open", last_failure="503", since=NOW - 2900, until=NOW + 95),
    "chat": Hold(reason="retry_after", since=NOW - 60, until=NOW + 1200),
}


async def found(clock: Clock) -> Company:
    """Return the log of a gateway with these rules."""
    log, topics = MemoryLog(now=clock), Topics("gateway.")
    events = [topics.events(source) for source in sorted(TYPES)]
    attempts = TopicSpec(name=topics.attempts, partitions=4, retention=7 * DAY)
    await log.create([*topics.specs(events, []), attempts])
    member = Silent()
    tiers = [topics.retry("5s"), topics.retry("5h")]
    router = await log.consume(group=topics.group(ROUTER_GROUP), topics=[*events, *tiers], listener=member)
    return Company(log, topics, router, member)


async def furnished() -> tuple[Company, Clock, dict[str, str]]:
    """Return a gateway's log, its clock, and what `furnish` returns."""
    clock = Clock()
    company = await found(clock)
    return company, clock, await furnish(company, clock)
