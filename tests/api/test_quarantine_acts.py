"""Refused requests are verified again by the API: what passes is admitted once, with an audit record of who did it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole, Principal
from gateway.api import quarantine_acts
from gateway.api.endpoints import BASE
from gateway.ops.audit import Act, read_acts
from gateway.quarantine.records import Missing
from gateway.rules.rules import Rules
from gateway.verify.kept_proof import conceal
from gateway.verify.request import Request
from tests.api.conftest import RULES, World, rules_of, world_of
from tests.api.test_findings import refuse
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

SALT = b"0123456789abcdef"
PATH = "/sources/github/refused/retry"
QUARANTINED = RULES.replace("    path: /github\n", "    path: /github\n    quarantine: true\n").replace(
    'secrets: ["${TOKEN}"]', "secrets: [a-secret-of-16-bytes]", 1
)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[World]:
    company = await Company.found(MemoryLog(now=Ticking()))
    specs = company.topics.specs([], has_quarantine=True)
    await company.log.create([each for each in specs if each.name == company.topics.rejected])
    async with world_of(company, tmp_path, QUARANTINED) as made:
        yield made


async def keep(
    company: Company, rules: Rules, *, token: str = "a-secret-of-16-bytes", number: int = 1, **fields: Any
) -> None:
    """Keep a request that was refused although today's secret verifies it, unless it has another token."""
    body = b'{"n": %d}' % number
    headers = ((b"Content-Type", b"application/json"), (b"X-Token", token.encode()))
    request = Request(method="POST", path="/github", query="", headers=headers, body=body)
    source = rules.sources["github"]
    kept = conceal(source.verifier, request, SALT)
    await refuse(
        company,
        "bad_credentials",
        headers=kept.headers,
        body=body,
        size=len(body),
        salt=SALT,
        credentials=kept.credentials,
        **fields,
    )


async def admitted(world: World) -> int:
    bounds = await world.company.log.bounds(world.company.topics.events("github"))
    return sum(end for _, end in bounds.values())


async def test_what_passes_is_admitted_once_and_recorded(place: World) -> None:
    for number in range(3):
        await keep(place.company, place.rules, number=number)
    await keep(place.company, place.rules, token="another-of-16-bytes", number=7)
    await keep(place.company, place.rules, number=8, missing=Missing.BODY)
    place.become(AccessRole.OPERATOR)
    dry = await place.post(PATH, {"dry_run": True}, 200)
    assert (dry["is_dry"], dry["admitted"], await admitted(place)) == (True, 3, 0)
    done = await place.post(PATH, {"reason": "they had rotated"}, 200)
    assert (done["admitted"], done["still_refused"], done["incomplete"]) == (3, {"bad_credentials": 1}, {"body": 1})
    assert await admitted(place) == 3
    again = await place.post(PATH, {}, 200)
    assert (again["admitted"], again["problem"], await admitted(place)) == (0, None, 3)
    async with aclosing(read_acts(place.company.log, place.company.topics)) as acts:
        (act,) = [each async for each in acts if isinstance(each, Act)]
    assert (act.record.who, act.record.what, act.record.why, act.outcome) == (
        "anna",
        "rejected retry",
        "they had rotated",
        "done",
    )


async def test_a_key_keeps_the_first_answer(place: World) -> None:
    await keep(place.company, place.rules)
    key = {"Idempotency-Key": "one"}
    first = await place.post(PATH, {}, 200, headers=key)
    await keep(place.company, place.rules, number=2)
    assert await place.post(PATH, {}, 200, headers=key) == first
    assert await admitted(place) == 1
    assert (await place.post(PATH, {"dry_run": True}, 422, headers=key))["code"] == "key_reused"
    place.access.principal = Principal(name="local", role=AccessRole.OPERATOR, via="oidc")  # somebody who is called so
    assert (await place.post(PATH, {"dry_run": True}, 200, headers=key))["admitted"] == 1
    assert (await place.post(PATH, {}, 200))["admitted"] == 1


async def test_a_key_keeps_the_first_answer_whatever_has_become_of_the_source(place: World, tmp_path: Path) -> None:
    await keep(place.company, place.rules)
    key = {"Idempotency-Key": "one"}
    first = await place.post(PATH, {}, 200, headers=key)
    text = QUARANTINED.replace("  github:", "  gitea:").replace("github", "gitea")
    place.rules = await asyncio.to_thread(rules_of, tmp_path / "new.yaml", text)
    async with place.backend.retrying:  # and while another is in progress
        assert await place.post(PATH, {}, 200, headers=key) == first
    await place.post(PATH, {}, 404)


async def test_two_at_a_time_admit_nothing_twice(place: World) -> None:
    for number in range(5):
        await keep(place.company, place.rules, number=number)
    url = f"{BASE}{PATH}"

    async def retry() -> tuple[int, Any]:
        async with place.client.post(url, json={}) as response:
            return response.status, await response.json()

    found = await asyncio.gather(*[retry() for _ in range(4)])
    assert {status for status, _ in found} == {200, 503}
    assert sum(answer["admitted"] for status, answer in found if status == 200) == await admitted(place) == 5


async def test_who_may_and_where(place: World) -> None:
    for role in (AccessRole.VIEWER, AccessRole.READER):
        place.become(role)
        assert (await place.post(PATH, {}, 403))["code"] == "forbidden"
    place.become(AccessRole.OPERATOR, sources=frozenset({"stripe"}))
    assert (await place.post(PATH, {}, 404))["code"] == "not_found"
    place.become(AccessRole.OPERATOR)
    place.backend.are_rules_bare = True
    problem = await place.post(PATH, {}, 409)
    assert "gateway rejected retry github" in problem["detail"]


async def test_one_that_takes_too_long_ends_and_is_finished_by_the_next(
    place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await keep(place.company, place.rules)
    append = place.company.log.append

    async def hang(topic: str, **given: Any) -> Any:
        found = await append(topic, **given)
        if topic == place.company.topics.events("github"):
            await asyncio.Event().wait()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(quarantine_acts, "SECONDS", 0.2)
        patch.setattr(place.company.log, "append", hang)
        assert (await place.post(PATH, {}, 409))["code"] == "conflict"
    assert isinstance(place.company.log, MemoryLog)
    place.company.log._now = lambda: 4e9  # the claim has ended by itself
    done = await place.post(PATH, {}, 200)
    assert (done["admitted"], done["present"], await admitted(place)) == (0, 1, 1)
