"""`gateway status` beside a running gateway: what keeps deliveries back, compared with what was done to it."""

import asyncio
import json
import os
import shlex
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from typing_extensions import override

from tests.acceptance.conftest import SOURCES, LogPlace, operators
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import Load
from tests.sink import Answer, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  busy: {{url: "{busy}"}}
  down: {{url: "{down}"}}
  well: {{url: "{well}"}}
routes:
  - {{name: to-busy, from: github, to: [busy], retry: {{schedule: [1h]}}}}
  - {{name: to-down, from: github, to: [down], retry: {{schedule: [1h]}}}}
  - {{name: forgotten, from: github, to: [well]}}
"""
)


SHARED = """
version: 1
sources:
  shop: {{verify: {{scheme: none}}, type: body.kind, id: body.customer, dedupe: 1h}}
destinations:
  well: {{url: "{well}"}}
routes:
  - {{name: all, from: shop, to: [well]}}
"""


async def _status(place: LogPlace, *words: str) -> tuple[int, list[dict[str, Any]]]:
    return await _json(place, "status", *words)


async def _json(place: LogPlace, command: str, *words: str) -> tuple[int, list[dict[str, Any]]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", command, "--json", "--log", place.url, *words),
        *(f"--topic-prefix={place.prefix}",),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, [json.loads(line) for line in out.splitlines()]


async def test_each_hold_is_reported_with_its_end_its_author_and_the_next_step(
    long_place: LogPlace, folder: Path
) -> None:
    silence = Answer(status=429, headers=(("Retry-After", "7200"),))
    async with Sink(silence) as busy, Sink(503) as down, Sink(200) as well:
        rules = RULES.format(busy=busy.url, down=down.url, well=well.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            async with operators(long_place) as commands:
                admin = f"http://127.0.0.1:{gateway.admin_port}"
                assert await _status(long_place, "--admin", admin, "--rules", str(gateway.rules)) == (0, [])
                await commands.pause("route/forgotten")
                await asyncio.sleep(1)
                load = Load(gateway.port, rate=20)
                await load.send(30)
                await gateway.until("gateway_breaker_open", 1, destination="down")
                await gateway.until("gateway_parked_backlog", 30)
            async with asyncio.timeout(20):
                while True:
                    code, told = await _status(long_place, "--admin", admin, "--rules", str(gateway.rules))
                    if sum(each["count"] or 0 for each in told if "→" in each["what"]) == 90:
                        break
            assert code == 1
            found = {(each["what"], each["why"]): each for each in told}
            paused = found["route forgotten", "paused"]
            assert paused["by"]
            assert paused["next"] == ["gateway route resume forgotten"]
            assert found["destination down", "breaker open after 503"]["next"] == [
                "# down responds with 503: ask its owners first",
                "gateway destination kick down",
            ]
            held = found["destination busy", "requested silence (Retry-After)"]
            assert held["until"] > held["since"]
            counts = {each["what"]: each["count"] for each in told if "→" in each["what"]}
            assert counts == {"to-busy → busy": 30, "to-down → down": 30, "forgotten → well": 30}
            assert told[0]["what"] == "route forgotten", "the worst first"
            async with asyncio.timeout(20):
                while True:  # an attempt may be under way, and its record not written
                    number = len(down.requests)
                    code, told = await _status(long_place, "down")
                    tries = [each for each in told if "attempt" in each]
                    if len(tries) == min(20, number):
                        break
            assert all(each["result"].startswith("503") for each in tries)
        assert len(well.requests) == 0


HALTING = (
    SOURCES.rstrip().removesuffix("}}")
    + """, key: string(body.k)}}
destinations:
  two: {{url: "{two}"}}
routes:
  - name: in-order
    from: github
    to: two
    order: key
    on_exhausted: halt
    retry: {{results: {{404: dead_letter}}}}
"""
)
DYING = (
    SOURCES
    + """
destinations:
  three: {{url: "{three}"}}
routes:
  - {{name: to-three, from: github, to: three, retry: {{results: {{5xx: dead_letter}}}}}}
"""
)


class Keyed(Load):
    @override
    def body(self, number: int) -> bytes:
        return b'{"n":%d,"k":%d}' % (number, number % 5)


async def test_a_kick_of_an_ordered_route_reports_its_responses(long_place: LogPlace, folder: Path) -> None:
    answers = [404]
    async with Sink(lambda _: answers[-1]) as two:
        rules = HALTING.format(two=two.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            await Keyed(gateway.port, rate=50).send(20)
            await gateway.until("gateway_ordered_halted_keys", 5)
            assert len(two.requests) == 5
            kick = "gateway destination kick two"
            told = await _call(gateway, long_place, kick)
            halted, step = told.splitlines()
            assert halted == (
                "kicked destination two: nothing waited for a retry; "
                "on ordered routes 5 tried now: 5 got 404 again; 15 wait (behind an earlier event of the key)"
            )
            assert step == "  gateway status two"
            assert len(two.requests) == 10
            await _call(gateway, long_place, "gateway destination pause two")
            told = await _call(gateway, long_place, kick)
            paused, step = told.splitlines()
            assert paused == (
                "kicked destination two: nothing waited for a retry; it is paused; "
                "on ordered routes 0 tried now, 20 wait (paused)"
            )
            assert step == "  gateway destination resume two"
            assert len(two.requests) == 10
            answers.append(200)
            await _call(gateway, long_place, "gateway destination resume two")
            await gateway.until("gateway_ordered_lag_records", 0)
            assert len(await two.received(30)) == 30


async def test_an_open_breaker_without_a_delivery_to_probe_it_is_not_wrong(long_place: LogPlace, folder: Path) -> None:
    answers = [500]
    async with Sink(lambda _: answers[-1]) as three:
        rules = DYING.format(three=three.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            asked = (f"--admin=http://127.0.0.1:{gateway.admin_port}", f"--rules={gateway.rules}")
            await Load(gateway.port, rate=20).send(5)
            await gateway.until("gateway_breaker_open", 1, destination="three")
            answers.append(200)
            await _call(gateway, long_place, "gateway dead drop --destination three --yes")
            told = await _call(gateway, long_place, "gateway destination kick three")
            assert "nothing was waiting; where a breaker is open, the next delivery is the probe" in told
            code, [row] = await _status(long_place, *asked)
            assert (code, row["what"], row["needs_attention"], row["until"]) == (0, "destination three", False, None)
            assert row["why"].startswith("breaker opened after 500; not tried by this process since ")
            assert row["next"] == []
            assert await _status(long_place, *asked) == (code, [row]), "nothing of it moves"
            for _ in range(3):
                await Load(gateway.port, rate=20).send(1)
                await asyncio.sleep(0.3)
            await gateway.until("gateway_breaker_open", 0, destination="three")
            assert await _status(long_place, *asked) == (0, [])
        assert len(three.requests) == 8


async def _call(gateway: GatewayProcess, place: LogPlace, command: str) -> str:
    """Run a next step as it is told."""
    assert command.startswith("gateway ")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *shlex.split(command)),
        env={
            **os.environ,
            "GATEWAY_RULES": str(gateway.rules),
            "GATEWAY_LOG": place.url,
            "GATEWAY_TOPIC_PREFIX": place.prefix,
        },
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


def _rules_of(first: Sink, late: Sink) -> tuple[str, str, str]:
    """Return rules without two routes, with one of them mistyped, and whole."""
    rules = RULES.format(busy=first.url, down=first.url, well=late.url)
    before = rules[: rules.index("  - {name: to-down")]
    return before, before + "  - {name: forgotten, from: github, match: {type: pusch}, to: [well]}\n", rules


async def _row(place: LogPlace, admin: str, what: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code, and the row about something."""
    code, found = await _status(place, "--admin", admin)
    (row,) = [each for each in found if each["what"] == what]
    return code, row


async def _once_replayed(
    place: LogPlace, admin: str, what: str, told: str = "replayed since"
) -> tuple[int, dict[str, Any]]:
    """Return the row of what was missed, once it says that this was replayed."""
    async with asyncio.timeout(20):
        while True:
            code, row = await _row(place, admin, what)
            if told in row["why"]:
                return code, row


async def test_events_missed_through_refused_rules_arrive_by_the_reported_step(
    long_place: LogPlace, folder: Path
) -> None:
    async with Sink(200) as first, Sink(200) as late:
        before, mistyped, rules = _rules_of(first, late)
        async with GatewayProcess(folder, rules=before, log=long_place.url, prefix=long_place.prefix) as gateway:
            admin = f"http://127.0.0.1:{gateway.admin_port}"
            load = Load(gateway.port, rate=40)
            await load.send(10)
            await asyncio.sleep(2.5)
            gateway.rules.write_text(mistyped + "  oops\n")
            earlier = set(load.acknowledged)
            await load.send(20)
            await gateway.until("gateway_rules_refused", 1)
            code, told = await _status(long_place, "--admin", admin)
            (refused,) = [each for each in told if each["what"] == "rules"]
            assert code == 1
            assert f"{gateway.rules.name} of " in refused["why"]
            assert refused["next"][0] == f"gateway check {gateway.rules}"
            gateway.rules.write_text(rules)
            await gateway.line("rules_reloaded", timeout=10)
            code, told = await _status(long_place, "--admin", admin, "--rules", str(gateway.rules))
            assert (code, [each["next"][-1] for each in told]) == (0, [refused["next"][-1]])
            await first.received(len(load.acknowledged), timeout=30)
            had = len(first.requests) + len(late.requests)
            await _call(gateway, long_place, refused["next"][-1])
            expected = set(load.acknowledged) - earlier
            await late.received(len(expected), timeout=30)
            code, row = await _once_replayed(long_place, admin, "rules")
            came = Counter(request.header("gateway-event-id") for request in late.requests)
            assert came == dict.fromkeys(expected, 1), gateway.story()
            assert (code, row["next"]) == (0, [])
            await first.received(had + len(expected), timeout=30)  # by `to-down`; `to-busy` had delivered them
            assert row["why"].endswith(f"replayed since: {len(first.requests) + len(late.requests) - had} queued")


async def test_events_unrouted_by_mistyped_rules_arrive_by_the_step_reported_before_and_after_the_fix(
    long_place: LogPlace, folder: Path
) -> None:
    async with Sink(200) as first, Sink(200) as late:
        before, mistyped, rules = _rules_of(first, late)
        async with GatewayProcess(folder, rules=before, log=long_place.url, prefix=long_place.prefix) as gateway:
            admin = f"http://127.0.0.1:{gateway.admin_port}"
            load = Load(gateway.port, rate=40)
            await load.send(10)
            await first.received(10, timeout=30)
            await asyncio.sleep(2.5)
            gateway.rules.write_text(
                mistyped.replace(
                    "  - {name: to-busy, from: github,", "  - {name: to-busy, from: github, match: {type: none},"
                )
            )
            await gateway.until("gateway_rules_reloads_total", 1, result="ok")
            earlier = set(load.acknowledged)
            await load.send(20)
            await gateway.until("gateway_unrouted_total", 20)
            code, told = await _status(long_place, "--admin", admin)
            (unrouted,) = [each for each in told if each["what"] == "source github"]
            assert (code, unrouted["count"]) == (1, 20)
            assert "route forgotten added" in unrouted["next"][0]
            assert unrouted["next"][3].removeprefix("gateway explain ") in load.acknowledged.keys() - earlier
            gateway.rules.write_text(gateway.rules.read_text().replace("pusch", "Push"))
            await gateway.until("gateway_rules_reloads_total", 2, result="ok")
            code, missed = await _row(long_place, admin, "source github")
            assert (code, missed["what"], missed["count"]) == (1, "source github", 20)
            assert missed["next"][-1] == unrouted["next"][-1]
            await _call(gateway, long_place, missed["next"][-1])
            code, missed = await _once_replayed(long_place, admin, "source github")
            assert (code, missed["next"][-1]) == (1, unrouted["next"][-1]), "it is still wrong, and nothing was brought"
            assert missed["why"].endswith("replayed since: 0 queued; still undelivered: at least 20")
            gateway.rules.write_text(rules)
            await gateway.until("gateway_rules_reloads_total", 3, result="ok")
            code, missed = await _row(long_place, admin, "source github")
            assert (code, missed["what"], missed["next"][-1]) == (1, "source github", unrouted["next"][-1])
            await _call(gateway, long_place, missed["next"][-1])
            expected = set(load.acknowledged) - earlier
            await late.received(20, timeout=30)
            await first.received(10 + 2 * 20, timeout=30)  # by `to-busy` and `to-down`
            queued = f"replayed since: {len(first.requests) - 10 + len(late.requests)} queued"
            code, row = await _once_replayed(long_place, admin, "source github", queued)
            assert (code, row["count"], row["next"]) == (0, 20, [])
            assert row["why"].endswith(queued)
            came = Counter(request.header("gateway-event-id") for request in late.requests)
            assert came == dict.fromkeys(expected, 1), gateway.story()


CONDITIONS = """
version: 1
sources:
  shop: {{verify: {{scheme: none}}, type: body.kind, key: body.customer}}
destinations:
  one: {{url: "{one}"}}
  two: {{url: "{two}"}}
routes:
  - {{name: orders, from: shop, match: {{type: {orders}}}, to: [one]}}
  - {{name: refunds, from: shop, match: {{type: {refunds}}}, to: [two], order: key}}
  {more}
"""


async def _send(gateway: GatewayProcess, **kinds: int) -> None:
    """Send that many events of each kind, and wait until all are routed."""
    async with ClientSession() as session:
        for kind, count in kinds.items():
            for number in range(count):
                body = {"kind": kind, "customer": f"{number % 3}"}
                async with session.post(f"http://127.0.0.1:{gateway.port}/in/shop", json=body) as answer:
                    assert answer.status == 202
    await gateway.until("gateway_log_lag_records", 0, topic="gateway.events.shop")


async def _rows(gateway: GatewayProcess, place: LogPlace, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit code of `gateway status` and its rows, by what they are about."""
    admin = f"http://127.0.0.1:{gateway.admin_port}"
    code, told = await _status(place, *words, "--admin", admin, "--rules", str(gateway.rules))
    return code, {each["what"]: each for each in told}


async def _condition(gateway: GatewayProcess, rules: str, number: int) -> None:
    """Put other rules in force, as the reload of that number."""
    await asyncio.sleep(1.5)  # the time of a change is that of the look before it
    gateway.rules.write_text(rules)
    await gateway.until("gateway_rules_reloads_total", number, result="ok")


@pytest.mark.full
async def test_a_condition_mistyped_from_the_start_is_reported_with_its_unrouted_events_and_the_remedy(
    long_place: LogPlace, folder: Path
) -> None:
    """The events that it doesn't match are less than a tenth of the source's."""
    async with Sink(200) as one, Sink(200) as two:
        values = {"one": one.url, "two": two.url, "orders": "order", "more": ""}
        rules = CONDITIONS.format(**values, refunds="refnd")
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            await _send(gateway, order=95, refund=9)
            await gateway.until("gateway_unrouted_total", 9)
            code, rows = await _rows(gateway, long_place)
            assert (code, set(rows)) == (0, {"source shop", "route refunds"})
            assert (
                rows["source shop"]["why"]
                == "unrouted (9 refund), of 104 that this process read since the process started"
            )
            assert rows["route refunds"]["why"] == "matched none of 104 events of shop since the process started"
            assert await _rows(gateway, long_place, "two") == (0, {"route refunds": rows["route refunds"]})
            assert await _rows(gateway, long_place, "one") == (0, {})
            await _condition(gateway, CONDITIONS.format(**values, refunds="refund"), 1)
            code, rows = await _rows(gateway, long_place)
            assert (code, set(rows)) == (0, {"source shop"})
            await _call(gateway, long_place, rows["source shop"]["next"][-1])
            await two.received(9, timeout=30)
            assert len(one.requests) == 95


@pytest.mark.full
async def test_a_changed_condition_that_matches_nothing_is_wrong_until_its_missed_events_are_replayed(
    long_place: LogPlace, folder: Path
) -> None:
    """With a fix in between that is none. The events are less than a tenth of the source's."""
    async with Sink(200) as one, Sink(200) as two:
        values = {"one": one.url, "two": two.url, "orders": "order", "more": ""}
        correct = CONDITIONS.format(**values, refunds="refund")
        async with GatewayProcess(folder, rules=correct, log=long_place.url, prefix=long_place.prefix) as gateway:
            await _send(gateway, order=101, refund=9)
            await two.received(9, timeout=30)
            await _condition(gateway, CONDITIONS.format(**values, refunds="refnd"), 1)
            await _send(gateway, order=95, refund=9)
            code, rows = await _rows(gateway, long_place, "two")
            assert (code, set(rows)) == (1, {"route refunds"})
            wrong = rows["route refunds"]
            assert wrong["why"] == "matched none of 104 events of shop since its condition changed; before, 9 of 110"
            change, _, explain, _, replay = wrong["next"]
            assert change.endswith(" changed route refunds: match")
            assert "type: expected refnd, got refund" in await _call(gateway, long_place, explain)
            assert (await _rows(gateway, long_place))[1]["route refunds"] == wrong

            await _condition(gateway, CONDITIONS.format(**values, refunds="Refund"), 2)
            code, rows = await _rows(gateway, long_place, "two")
            assert (code, rows["route refunds"]["next"][-1]) == (1, replay)
            await _call(gateway, long_place, replay)
            code, rows = await _rows(gateway, long_place, "two")
            assert (code, rows["route refunds"]["next"][-1]) == (1, replay), (
                "it is still wrong, and nothing was brought"
            )
            assert rows["route refunds"]["why"].endswith("before, 9 of 110; replayed since: 0 queued")

            await _condition(gateway, correct, 3)
            assert (await _rows(gateway, long_place, "two"))[0] == 1
            await _call(gateway, long_place, replay)
            await two.received(18, timeout=30)
            code, rows = await _rows(gateway, long_place)
            assert (code, rows["route refunds"]["next"]) == (0, [])
            assert rows["route refunds"]["why"].endswith("replayed since: 9 queued")
            assert (len(one.requests), len(two.requests)) == (101 + 95, 18)


@pytest.mark.full
async def test_mistyped_conditions_are_reported_though_another_route_matches(
    long_place: LogPlace, folder: Path
) -> None:
    async with Sink(200) as one, Sink(200) as two:
        both = "- {name: both, from: shop, to: [one]}"
        values = {"one": one.url, "two": two.url, "more": both}
        mistyped = CONDITIONS.format(**values, orders="ordr", refunds="ordr")
        correct = CONDITIONS.format(**values, orders="order", refunds="order")
        async with GatewayProcess(folder, rules=mistyped, log=long_place.url, prefix=long_place.prefix) as gateway:
            await _send(gateway, order=40)
            code, rows = await _rows(gateway, long_place)
            assert (code, set(rows)) == (0, {"route orders", "route refunds"})
            assert {row["why"] for row in rows.values()} == {
                "matched none of 40 events of shop since the process started"
            }
            await _condition(gateway, correct, 1)
            await _send(gateway, order=20)
            await two.received(20, timeout=30)
            await gateway.until("gateway_ordered_lag_records", 0)
            await asyncio.sleep(2)  # until a commit tells that all is delivered
            assert await _rows(gateway, long_place) == (0, {})
            await _condition(gateway, mistyped, 2)
            await _send(gateway, order=40)
            assert (await gateway.metrics()).sum("gateway_unrouted_total") == 0
            code, rows = await _rows(gateway, long_place)
            assert (code, set(rows)) == (1, {"route orders", "route refunds"})
            for name, row in rows.items():
                assert row["why"] == "matched none of 40 events of shop since its condition changed; before, 20 of 20"
                assert row["next"][-1].startswith(f"gateway replay --{name} --from ")
            assert (await _rows(gateway, long_place, "two"))[1].keys() == {"route refunds"}


async def test_an_identity_shared_by_different_events_is_reported_with_its_cost_and_the_remedy(
    long_place: LogPlace, folder: Path
) -> None:
    bodies = [
        {"kind": "order" if number % 3 else "ping", "customer": number % 5, "n": number % 2} for number in range(60)
    ]
    told_apart = {(body["kind"], body["customer"], body["n"]) for body in bodies}
    async with Sink(200) as well:
        rules = SHARED.format(well=well.url)
        async with GatewayProcess(folder, rules=rules, log=long_place.url, prefix=long_place.prefix) as gateway:
            ids: list[str] = []
            async with ClientSession() as session:
                address = f"http://127.0.0.1:{gateway.port}/in/shop"
                for number, body in enumerate(bodies):
                    async with session.post(address, json=body, headers={"X-Message-Id": f"{number}"}) as answer:
                        assert answer.status == 202
                        ids.append((await answer.json())["id"])
            await well.received(len(told_apart), timeout=30)
            await gateway.until("gateway_duplicates_total", 60 - len(told_apart))
            code, told = await _json(long_place, "check", str(gateway.rules), "--since", "1h")
            counts = {each["type"]: each for each in told if "events" in each}
            assert code == 1
            for kind in ("order", "ping"):
                events = [body for body in bodies if body["kind"] == kind]
                different = {key for key in told_apart if key[0] == kind}
                assert counts[kind] == {
                    "source": "shop",
                    "type": kind,
                    "events": len(events),
                    "copies": len(events) - len(different),
                    "conflicts": len(different) - sum(body["kind"] == kind for body in bodies[:5]),
                    "without_identity": 0,
                }
            code, told = await _status(long_place, "--admin", f"http://127.0.0.1:{gateway.admin_port}")
            copies, conflicts = sorted(
                [each for each in told if each["what"] == "source shop"], key=lambda each: -each["count"]
            )
            assert copies["why"].startswith("duplicates that dedupe suppressed (")
            assert copies["count"] == 60 - len(told_apart)
            assert conflicts["why"].startswith("conflicts: same identity as an earlier event")
            assert conflicts["count"] == len(told_apart) - 5
            assert "gateway check --since 1h" in copies["next"]
            assert copies["next"] == conflicts["next"]
            out = await _call(gateway, long_place, f"gateway explain {ids[-1]}")
            assert "acknowledged, and delivered by no route" in out
            await _call(gateway, long_place, out.splitlines()[-1].strip())
            await well.received(len(told_apart) + 1, timeout=30)
            assert json.loads(well.requests[-1].body) == bodies[-1]
            gateway.rules.write_text(rules.replace("body.customer", "\"headers['x-message-id']\""))
            await gateway.until("gateway_rules_reloads_total", 1, result="ok")
            admin = f"http://127.0.0.1:{gateway.admin_port}"
            code, (missed,) = await _status(long_place, "--admin", admin, "--rules", str(gateway.rules))
            assert (code, missed["what"], missed["count"]) == (1, "source shop", 60 - len(told_apart))
            assert missed["next"][-1] == copies["next"][-1]
            await _call(gateway, long_place, missed["next"][-1])
            await well.received(len(ids), timeout=30)
            code, row = await _once_replayed(long_place, admin, "source shop")
            assert (code, row["count"], row["next"]) == (0, missed["count"], [])
            assert row["why"].endswith(f"replayed since: {len(ids) - len(told_apart)} queued")
            came = Counter(request.body for request in well.requests)
            assert came == Counter(json.dumps(body).encode() for body in bodies), gateway.story()


async def test_refused_signatures_are_counted_from_the_first_of_them_and_end_with_the_secret_that_was_missing(
    place: LogPlace, folder: Path
) -> None:
    async with Sink(200) as well:
        rules = RULES.format(busy=well.url, down=well.url, well=well.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            admin = f"http://127.0.0.1:{gateway.admin_port}"
            await Load(gateway.port, rate=40).send(10)
            began = time.time()
            async with ClientSession() as session:
                for _ in range(12):
                    headers = {"X-Hub-Signature-256": "sha256=" + "0" * 64, "X-GitHub-Event": "push"}
                    async with session.post(
                        f"http://127.0.0.1:{gateway.port}/in/github", json={}, headers=headers
                    ) as answer:
                        assert answer.status == 401
            code, told = await _status(place, "--admin", admin)
            (row,) = [each for each in told if each["what"] == "source github"]
            assert (code, row["count"]) == (1, 12)
            assert "refused: bad_signature, of 12 to this process since the first; the last at" in row["why"]
            assert datetime.fromisoformat(row["since"]).timestamp() >= began - 1
            assert "gateway explain github" in row["next"]
            assert "\nverify github" in await _call(gateway, place, "gateway explain github")
            await asyncio.sleep(1.5)
            gateway.rules.write_text(rules.replace("secrets: [", "secrets: [another-secret-than-before, ", 1))
            await gateway.until("gateway_rules_reloads_total", 1, result="ok")
            assert await _status(place, "--admin", admin, "--rules", str(gateway.rules)) == (0, [])


async def test_an_absent_field_is_reported_with_the_present_ones_and_delivered_once_it_is_optional(
    long_place: LogPlace, folder: Path
) -> None:
    async with Sink(200) as well:
        plain = SHARED.format(well=well.url).replace("dedupe: 1h", "dedupe: off")
        absent, optional = [
            plain.replace("to: [well]", f'to: [well], request: {{body: "${{{{ {written} }}}}"}}')
            for written in ("body.user.mail", "has(body.user.mail) ? body.user.mail : body.user.name")
        ]
        async with GatewayProcess(folder, rules=plain, log=long_place.url, prefix=long_place.prefix) as gateway:
            words = ("--admin", f"http://127.0.0.1:{gateway.admin_port}", "--rules", str(gateway.rules))
            gateway.rules.write_text(absent)
            await gateway.until("gateway_rules_reloads_total", 1, result="ok")
            async with ClientSession() as session:
                event = {"kind": "order", "customer": 1, "user": {"name": "jo"}}
                async with session.post(f"http://127.0.0.1:{gateway.port}/in/shop", json=event) as answer:
                    assert answer.status == 202
            await gateway.until("gateway_dead_letters_total", 1, reason="expression_error")
            code, (row,) = await _status(long_place, *words)
            why = "request.body: body.user.mail isn't there (check with has(body.user.mail))"
            assert (code, row["why"]) == (1, f"dead letters: expression_error, {why}")
            changed, explain, _, replay = row["next"]
            assert changed.startswith("# the rules loaded at ")
            assert changed.endswith(" changed route all: request")
            assert "body.user has: name" in await _call(gateway, long_place, explain)
            gateway.rules.write_text(optional)
            await gateway.until("gateway_rules_reloads_total", 2, result="ok")
            await _call(gateway, long_place, replay)
            await well.received(1, timeout=30)
            assert well.requests[0].body == b"jo"
            async with asyncio.timeout(5):  # its completion is committed within a second
                while (await _status(long_place, *words)) != (0, []):  # noqa: ASYNC110 - a command
                    await asyncio.sleep(0.2)


async def test_without_a_log_a_process_reports_its_part_and_that_more_is_unknown(place: LogPlace, folder: Path) -> None:
    async with Sink(200) as well:
        rules = RULES.format(busy=well.url, down=well.url, well=well.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            nowhere = LogPlace(url="kafka://127.0.0.1:1", prefix=place.prefix)
            code, (unread,) = await _status(nowhere, "--admin", f"http://127.0.0.1:{gateway.admin_port}")
            assert (code, unread["what"]) == (1, "the log")
            assert unread["why"].startswith("not read: ")
            assert (await _status(nowhere))[0] != 0
