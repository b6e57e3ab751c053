"""An event as a test of the rules: what is saved of it is what `gateway events export` writes, and it passes."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.access.principal import AccessRole
from gateway.log.records import decode_event
from gateway.model import Event
from gateway.ops import event_test
from gateway.ops import explain as explaining
from gateway.ops.event_export import Export
from gateway.ops.explain import Planned
from gateway.ops.log_search import Found, find_event
from gateway.ops.rule_tests import read_snapshots, run_test
from gateway.rules.load import load_rules
from gateway.rules.rule_tests import read_tests
from tests.api.conftest import RULES, World, rules_of
from tests.api.test_explaining import many_requests
from tests.builders import an_event


async def saved(world: World, name: str) -> dict[str, Any]:
    await world.refresh()
    answer: dict[str, Any] = await world.get(f"/events/{name}/test")
    return answer


def results(folder: Path, rules: Path) -> list[tuple[str, ...]]:
    """Return what `gateway test` finds with the files of a folder, for each test."""
    found = load_rules(rules, environ={}, resolve=False, reads_secrets=False)
    tests, problems = read_tests([], [folder / "tests.yaml"])
    assert problems == []
    snapshots = read_snapshots(folder / "tests.yaml")
    return [run_test(found, test, snapshots, now=0.0).differences for test in tests]


def exported_to(folder: Path, rules: Path, found: Found) -> dict[str, bytes]:
    """Return what `gateway events export` writes of an event."""
    export = Export(folder)
    export.add(found, load_rules(rules, environ={}, resolve=False))
    export.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unpack(answer: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    for each in answer["files"]:
        (folder / each["name"]).write_text(each["text"])
    return folder


async def test_it_passes_until_the_rules_do_something_else(world: World, tmp_path: Path) -> None:
    event, *_ = await world.company.event(
        type="push", headers={"Content-Type": "application/json", "X-Token": "a-secret-token", "X-Kind": "a"}
    )
    answer = await saved(world, event.id)
    assert [each["name"] for each in answer["files"]] == [f"github.push.{event.id}.json", "tests.yaml"]
    assert (answer["routes"], answer["withheld"]) == (["audit"], ["header x-token"])
    assert "a-secret-token" not in str(answer)
    folder, rules = unpack(answer, tmp_path / "saved"), tmp_path / "routes.yaml"
    assert await asyncio.to_thread(results, folder, rules) == [()]
    rules.write_text(RULES.replace("stripe]\n    to: ledger", "stripe]\n    to: ci"))
    (differences,) = await asyncio.to_thread(results, folder, rules)
    assert differences


async def test_it_is_what_the_command_writes(world: World, tmp_path: Path) -> None:
    for body in ({"ref": "main"}, b"\xff\xfe\x00", b""):
        event, *_ = await world.company.event(body=body)
        answer = await saved(world, event.id)
        found = await find_event(world.company.log, [world.company.topics.events("github")], event.id)
        assert found is not None
        folder = tmp_path / event.id
        written = await asyncio.to_thread(exported_to, folder, tmp_path / "routes.yaml", found)
        files = {each["name"]: each["text"].encode() for each in answer["files"]}
        name = next(each for each in files if each != "tests.yaml")
        assert files[name] == written[name]
        assert decode_event(found.record).id == event.id


async def test_a_credential_that_begins_in_a_character_of_the_type_is_masked(world: World) -> None:
    made = an_event(source="github", type="\u00e9" + "a" * 16)
    event = replace(made, headers=((b"X-Session-Token", b"\xa9" + b"a" * 16),))
    await world.company.store(event)
    answer = await saved(world, event.id)
    assert (await world.get(f"/events/{event.id}/exported"))["type"] == "\ufffd***"
    assert answer["withheld"] == ["header x-session-token", "type"]


async def test_no_secret_of_this_machine_or_of_the_rules_is_in_it(world: World, tmp_path: Path) -> None:
    text = RULES.replace(
        '"https://ledger.example/"', '"https://ledger.example/${TOKEN}/hunter2", headers: {X-Key: hunter3}'
    )
    text = text.replace(
        "stripe]\n    to: ledger\n", "stripe]\n    to: ledger\n    request: {body: {key: '${TOKEN}'}}\n"
    )
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    event, *_ = await world.company.event()
    answer = await saved(world, event.id)
    for secret in ("a-secret-token", "hunter", "ledger.example"):
        assert secret not in str(answer), secret
    folder = unpack(answer, tmp_path / "saved")
    assert await asyncio.to_thread(results, folder, tmp_path / "routes.yaml") == [()]


async def test_what_is_made_of_a_body_is_expected_and_what_cant_be_made(world: World, tmp_path: Path) -> None:
    made = "    request: {body: {id: '${{ id }}', of: '${{ body.ref }}'}}\n"
    text = RULES.replace(
        "    from: [github, stripe]\n    to: ledger\n", f"    from: [github, stripe]\n    to: ledger\n{made}"
    )
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    for number, (body, key) in enumerate((({"ref": "main"}, "body"), ({"other": 1}, "error"))):
        event, *_ = await world.company.event(body=body)
        answer = await saved(world, event.id)
        test = orjson.loads(answer["files"][1]["text"].splitlines()[1].removeprefix("  - "))
        (request,) = test["expect"]["requests"]
        assert (request["route"], request["to"], key in request) == ("audit", "ledger", True)
        folder = unpack(answer, tmp_path / f"saved{number}")
        assert await asyncio.to_thread(results, folder, tmp_path / "routes.yaml") == [()]
        changed = tmp_path / "changed.yaml"
        changed.write_text(text.replace("of: '${{ body.ref }}'", "at: '${{ source }}'"))
        (differences,) = await asyncio.to_thread(results, folder, changed)
        assert differences


async def test_of_many_large_requests_some_are_made_at_a_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 routes make 20 requests each, all with the event's body of 100 KB in them: 80 MB."""
    made = 0
    body_size = explaining._size

    def counted(planned: Planned, event: Event) -> int:
        nonlocal made
        made += 0 if planned.request is None else len(planned.request.body)
        return body_size(planned, event)

    text = many_requests(", request: {body: {it: '${{ body }}'}}")
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    event, *_ = await world.company.event(body={"text": "x" * 100_000})
    monkeypatch.setattr(explaining, "_size", counted)
    answer = await saved(world, event.id)
    assert 0 < made < 2 * (event_test.MOST_MADE + 200_000)  # to be saved, and to see that it passes
    assert len(answer["routes"]) == 40
    folder = unpack(answer, tmp_path / "saved")
    assert await asyncio.to_thread(results, folder, tmp_path / "routes.yaml") == [()]


async def test_files_with_other_rules_than_those_in_force_make_none(world: World, tmp_path: Path) -> None:
    event, *_ = await world.company.event()
    for text in (RULES + "\n# another\n", "routes: 1"):
        (tmp_path / "routes.yaml").write_text(text)
        await world.refresh()
        assert (await world.get(f"/events/{event.id}/test", 503))["code"] == "rules_unavailable"
    world.backend.are_rules_bare = True  # as in a process of the role console
    assert (await world.get(f"/events/{event.id}/test"))["routes"] == ["audit"]


async def test_an_event_that_can_be_none_says_why(world: World, tmp_path: Path) -> None:
    text = RULES.replace("{scheme: token, header: X-Token,", "{scheme: token, field: t,", 1)
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    event, *_ = await world.company.event(body={"t": "abc"})
    await world.refresh()
    problem = await world.get(f"/events/{event.id}/test", 409)
    assert "too short to be masked" in problem["detail"]
    assert (await world.get("/events/evt_none/test", 404))["code"] == "not_found"


async def test_one_that_takes_too_long_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    event, *_ = await world.company.event(body={"text": "x" * 500_000})
    await world.refresh()
    monkeypatch.setattr("gateway.api.event_tests.MOST_SECONDS", 0.0)
    problem = await world.get(f"/events/{event.id}/test", 409)
    assert problem["detail"].startswith("expected an event that is tried within 0 s")


@pytest.mark.parametrize("limits", [{"sources": frozenset({"stripe"})}, {"owners": frozenset({"payments"})}], ids=str)
async def test_it_is_for_who_reads_bodies_and_sees_the_source(world: World, limits: dict[str, frozenset[str]]) -> None:
    event, *_ = await world.company.event()
    await world.refresh()
    world.become(AccessRole.VIEWER)
    await world.get(f"/events/{event.id}/test", 403)
    world.become(AccessRole.READER, **limits)
    await world.get(f"/events/{event.id}/test", 404)
    world.become(AccessRole.READER)
    answer = await world.get(f"/events/{event.id}/test")
    assert orjson.loads(answer["files"][0]["text"])["id"] == event.id
