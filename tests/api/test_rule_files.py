"""The rule files by the API: line by line, without secrets, and for who has limits only what is theirs."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gateway.access.principal import AccessRole
from gateway.ops.shown_rules import shown_file
from tests.api.conftest import RULES, World, rules_of

BEGAN = 1_764_532_800.0


def texts(answer: dict[str, Any]) -> list[str]:
    return [each["text"] or "" for each in answer["lines"]]


async def test_all_of_a_file_is_shown_in_pieces_without_secrets(world: World) -> None:
    whole = await world.get("/rules/file")
    assert (whole["is_in_force"], whole["next_line"], whole["found"], whole["problem"]) == (True, None, None, None)
    assert [each["number"] for each in whole["lines"]] == [*range(1, RULES.count("\n") + 1)]
    assert "hooks/secret" not in str(whole)
    assert '  ci: {url: "https://ci.example/***"}' in texts(whole)
    (file,) = whole["files"]
    assert (file["sources"], file["destinations"], file["routes"]) == (2, 2, 3)
    lines: list[dict[str, Any]] = []
    piece: dict[str, Any] = {"next_line": 1}
    while piece["next_line"]:
        piece = await world.get("/rules/file", line=piece["next_line"], limit=7)
        lines += piece["lines"]
    assert lines == whole["lines"]
    assert (await world.get("/rules/file", line=10_000))["lines"] == []
    assert (await world.get("/rules/file", number=1, status=404))["code"] == "not_found"


async def test_a_name_is_found_and_each_line_with_one_says_which(world: World) -> None:
    for kind, name in (("route", "book"), ("source", "stripe"), ("destination", "ledger")):
        answer = await world.get("/rules/file", kind=kind, name=name)
        line = next(each for each in answer["lines"] if each["number"] == answer["found"])
        assert (line["kind"], line["name"]) == (kind, name)
        assert name in line["text"]
    assert (await world.get("/rules/file", kind="route", name="none", status=404))["code"] == "not_found"
    assert (await world.get("/rules/file", kind="route", status=400))["code"] == "invalid_request"


async def test_what_is_on_the_disk_and_not_in_force_is_told(world: World, tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text(RULES.replace("name: book", "name: bill"))
    answer = await world.get("/rules/file")
    assert not answer["is_in_force"]
    bill = next(each for each in answer["lines"] if "bill" in (each["text"] or ""))
    assert bill["name"] is None, "there is no page of it"
    file.write_text("routes: [{")
    broken = await world.get("/rules/file")
    assert (broken["lines"], broken["is_in_force"]) == ([], False)
    assert "isn't YAML" in broken["problem"]
    file.unlink()
    assert "can't be read" in (await world.get("/rules/file"))["problem"]
    world.rules = await asyncio.to_thread(rules_of, file)
    assert (await world.get("/rules/file"))["is_in_force"]


async def test_tests_arent_shown_and_lines_keep_their_numbers(world: World, tmp_path: Path) -> None:
    text = RULES.replace(
        "routes:\n",
        "tests:\n  - name: x\n    event: {source: github, body: {card: 4242}}\n    expect: {routes: []}\nroutes:\n",
    )
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    answer = await world.get("/rules/file")
    (hidden,) = [each for each in answer["lines"] if each["hidden"]]
    assert hidden["last"] - hidden["number"] == 3
    assert "4242" not in str(answer)
    number = next(each["number"] for each in answer["lines"] if each["text"] == "routes:")
    assert text.splitlines()[number - 1] == "routes:"


async def test_who_has_limits_sees_what_is_theirs(world: World) -> None:
    world.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    answer = await world.get("/rules/file")
    text = "\n".join(texts(answer))
    assert "stripe:" in text
    assert "name: book" in text
    for other in ("github:", "name: build", "ci:"):
        assert other not in text, other
    assert {each["name"] for each in answer["lines"] if each["name"]} == {"stripe", "ledger", "book"}
    assert (await world.get("/rules/file", kind="route", name="build", status=404))["code"] == "not_found"
    await world.get("/rules/file", kind="route", name="book")
    world.become(AccessRole.VIEWER, sources=frozenset({"nothing"}))
    (hidden,) = (await world.get("/rules/file"))["lines"]
    assert hidden["hidden"] == "not yours"


async def test_who_has_limits_learns_nothing_of_files_that_are_others(world: World, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("routes:\n  - {name: count, from: stripe, to: ledger, owner: payments}\n")
    (tmp_path / "theirs.yaml").write_text("routes:\n  - {name: chat, from: github, to: ci, owner: platform}\n")
    text = RULES.replace("version: 1\n", "version: 1\ninclude: [ours.yaml, theirs.yaml]\n")
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    names = [each["file"].rpartition("/")[2] for each in (await world.get("/rules/file"))["files"]]
    ours, theirs = names.index("ours.yaml"), names.index("theirs.yaml")
    world.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    (root,) = (await world.get("/rules/file"))["files"]
    assert (root["sources"], root["destinations"], root["routes"]) == (1, 1, 1)
    assert "count" in str((await world.get("/rules/file", number=ours))["lines"])
    refused = await world.get("/rules/file", 404, number=theirs)
    assert refused == await world.get("/rules/file", 404, number=len(names))


async def test_who_has_limits_learns_of_changes_and_problems_how_many_there_are(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the names and lines of others that rules have: `/rules` has none of them."""
    changed = ("route build: match", "route book: when", "route chat removed", "source stripe added", "and 12 more")
    problems = ("routes.d/platform.yaml:3:1: routes[0].to: expected a destination, got 'secret-project'", "more")
    status = dict(world.backend.rules_status())
    refusal = {"since": BEGAN, "file": "/etc/rules/routes.d/platform.yaml", "problems": problems}
    status |= {"changed": changed, "refused": True, "refusal": refusal}
    monkeypatch.setattr(world.backend, "rules_status", lambda: status)
    world.become(AccessRole.VIEWER)
    whole = await world.get("/rules")
    assert (whole["changed"], whole["refusal"]["problems"]) == ([*changed], [*problems])
    assert (whole["sources"], whole["destinations"], whole["routes"]) == (2, 2, 3)
    world.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    told = await world.get("/rules")
    assert told["changed"] == ["route book: when", "source stripe added", "14 other changes"]
    assert told["refusal"] == {
        "since": whole["refusal"]["since"],
        "file": whole["file"],
        "problems": ["2 problems: shown to principals without limits"],
    }
    assert (told["sources"], told["destinations"], told["routes"]) == (1, 1, 1)


async def test_files_are_read_once_until_one_changes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def counted(text: str) -> Any:
        nonlocal read
        read += 1
        return shown_file(text)

    monkeypatch.setattr("gateway.ops.rule_file_views.shown_file", counted)
    await world.get("/sources")  # the names, too, are looked over once
    await asyncio.gather(*[world.get("/rules/file") for _ in range(20)])
    assert read == 1
    (tmp_path / "routes.yaml").write_text(RULES + "# more\n")
    await world.get("/rules/file")
    assert read == 2


async def test_a_line_that_has_others_things_too_isnt_shown(world: World, tmp_path: Path) -> None:
    lines = [
        '  ci: {url: "https://ci.example/hooks/secret"}\n',
        '  ledger: {url: "https://ledger.example/", owner: payments, rate: 10/s}\n',
    ]
    both = "{" + ", ".join([each.strip() for each in lines]) + "}"
    text = RULES.replace("destinations:\n" + "".join(lines), f"destinations: {both}\n")
    assert text != RULES
    world.rules = await asyncio.to_thread(rules_of, tmp_path / "routes.yaml", text)
    world.become(AccessRole.VIEWER, owners=frozenset({"payments"}))
    assert "ledger.example" not in str(await world.get("/rules/file"))
    world.become(AccessRole.VIEWER)
    assert "ledger.example" in str(await world.get("/rules/file"))
