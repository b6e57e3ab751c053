"""`gateway diff`: what a change of the rules does to events that there were."""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event
from gateway.log.topics import Topics
from gateway.required_topics import specs_of
from gateway.rules.load import load_rules
from tests.builders import an_event

RULES = """
version: 1
sources:
  shop: {verify: {scheme: token, header: X-Token, secrets: ["${SECRET}"]}, type: body.kind, id: body.id}
destinations:
  erp: {url: "${ERP_URL}", headers: {X-Key: "${KEY}"}}
  chat: {url: "https://chat.example/in"}
routes:
  - {name: order, from: shop, match: {type: order.*}, to: erp, request: {body: {id: "${{ body.id }}"}}}
  - {name: told, from: shop, match: {body.by: {exists: true}}, to: [erp, chat]}
"""
BODIES = ('{"kind": "order.paid", "id": 1}', '{"kind": "order.open", "id": 2, "by": "jo"}', '{"kind": "ping", "id": 3}')

Compare = Callable[..., tuple[int, dict[str, dict[str, object]], str]]


def a_line(number: int, body: str) -> str:
    fields = {"id": f"evt_{number}", "source": "shop", "type": json.loads(body)["kind"], "key": None, "query": ""}
    return json.dumps(fields | {"headers": [["Content-Type", "application/json"]], "body": body})


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Return a function that compares changed rules with RULES: exit code, what each route counts, and what is said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERP_URL", "https://of-this-machine.example")
    monkeypatch.setenv("KEY", "s3cret-of-this-machine")
    (tmp_path / "old.yaml").write_text(RULES)
    (tmp_path / "events").write_text("\n".join([a_line(number, body) for number, body in enumerate(BODIES)]) + "\n\n")

    def compare(
        changes: Mapping[str, str], *arguments: str, old: str = "old.yaml"
    ) -> tuple[int, dict[str, dict[str, object]], str]:
        text = RULES
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "new.yaml").write_text(text)
        given = arguments or ("--events", "events")
        code = main(["diff", old, "new.yaml", *given])
        said = "".join(capsys.readouterr())
        assert main(["diff", old, "new.yaml", *given, "--json"]) == code
        out = capsys.readouterr().out
        lines = [json.loads(line) for line in out.splitlines()] if code < 2 else []
        return code, {line.pop("route"): line for line in lines}, said

    return compare


def counts(route: dict[str, object]) -> tuple[object, ...]:
    return tuple([route[key] for key in ("before", "after", "gained", "lost", "changed")])


def test_the_same_rules_change_nothing(compare: Compare) -> None:
    code, routes, said = compare({})
    assert code == 0
    assert {name: counts(route) for name, route in routes.items()} == {
        "order": (2, 2, 0, 0, 0),
        "told": (2, 2, 0, 0, 0),
    }
    assert said == "3 events: no route changed; 1 without a route\n"


def test_what_a_route_gains_and_loses_is_counted_and_shown(compare: Compare) -> None:
    code, routes, said = compare({"type: order.*": "type: [order.paid, ping]"})
    assert code == 1
    assert counts(routes["order"]) == (2, 2, 1, 1, 0)
    assert routes["order"]["samples"] == {"gained": [["evt_2", ["to erp"]]], "lost": [["evt_1", ["to erp"]]]}
    assert "lost order: evt_1 to erp\ngained order: evt_2 to erp\n" in said
    assert said.endswith("3 events: 1 of 2 routes changed; 0 without a route, 1 before\n")


def test_a_changed_request_is_shown_where_it_differs(compare: Compare) -> None:
    code, routes, said = compare({'{id: "${{ body.id }}"}': '{id: "no ${{ body.id }}", n: 1}'})
    assert code == 1
    assert counts(routes["order"]) == (2, 2, 0, 0, 2)
    assert '  request.body.id: was 1, is "no 1"\n  request.body.n: was none, is 1\n' in said
    assert counts(routes["told"]) == (2, 2, 0, 0, 0)


@pytest.mark.usefixtures("compare")
def test_what_a_name_stands_for_is_a_change(tmp_path: Path) -> None:
    rules = RULES.replace("match: {type: order.*}", "let: {v: body.id, yes: 'true'}, match: {type: order.*}")
    rules = rules.replace('"${{ body.id }}"', '"${{ v }}", f: true')
    (tmp_path / "old.yaml").write_text(rules)
    (tmp_path / "other.yaml").write_text(rules.replace("v: body.id", "v: body.kind").replace("f: true", "f: 1"))
    assert main(["diff", "old.yaml", "other.yaml", "--events", "events"]) == 1
    (tmp_path / "other.yaml").write_text(rules.replace("f: true", "f: 1"))
    assert main(["diff", "old.yaml", "other.yaml", "--events", "events"]) == 1


def test_a_changed_destination_changes_each_route_to_it(compare: Compare) -> None:
    _, routes, said = compare({"https://chat.example/in": "https://chat.example/new"})
    assert counts(routes["told"]) == (2, 2, 0, 0, 1)
    assert counts(routes["order"]) == (2, 2, 0, 0, 0)
    assert 'request.url: was "https://chat.example/in", is "https://chat.example/new"' in said


def test_no_secret_of_this_machine_is_shown(compare: Compare) -> None:
    code, _, said = compare({'"${KEY}"': '"${KEY} more"', '"${ERP_URL}"': '"${ERP_URL}/v2"'})
    assert code == 1
    assert "this-machine" not in said
    assert 'request.url: was "${ERP_URL}", is "${ERP_URL}/v2"' in said


def test_a_route_or_a_destination_that_is_only_in_one_version_is_counted(compare: Compare) -> None:
    _, routes, _ = compare({"name: told": "name: tell", "to: [erp, chat]": "to: chat"})
    assert counts(routes["told"]) == (2, 0, 0, 2, 0)
    assert counts(routes["tell"]) == (0, 1, 1, 0, 0)


def test_events_are_classified_anew_by_a_source_that_does_it_otherwise(compare: Compare) -> None:
    _, routes, _ = compare({"type: body.kind,": "type: \"'order.' + body.kind\","})
    assert counts(routes["order"]) == (2, 3, 1, 0, 0)


def test_a_request_that_cannot_be_made_any_more_is_a_change(compare: Compare) -> None:
    _, routes, said = compare({"${{ body.id }}": "${{ body.by }}", "match: {type: order.*}": "when: body.id < 3"})
    assert counts(routes["order"]) == (2, 2, 0, 0, 2)
    assert "request.error: was none, is \"request.body: body.by isn't there" in said


def test_a_condition_that_fails_is_a_change(compare: Compare) -> None:
    _, routes, said = compare({"match: {type: order.*}": "when: body.id + body.kind != ''"})
    assert counts(routes["order"]) == (2, 3, 1, 0, 2)
    assert 'request.error: was none, is "when: ' in said


def test_a_revision_of_git_is_read_with_what_it_includes(compare: Compare, tmp_path: Path) -> None:
    folder = tmp_path / "rules"
    (folder / "more").mkdir(parents=True)
    (folder / "routes.yaml").write_text(RULES + "include: more/*.yaml\n")
    (folder / "more" / "a.yaml").write_text("routes: [{name: more, from: shop, to: chat}]\n")
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "rules"], ["commit", "-qm", "rules"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True, timeout=30)
    (folder / "more" / "a.yaml").unlink()
    _, routes, _ = compare({}, old="HEAD:rules/routes.yaml")
    assert counts(routes["more"]) == (3, 0, 0, 3, 0)
    code, _, said = compare({}, old="nothing:rules/routes.yaml")
    assert code == 2
    assert said == "error: nothing:rules/routes.yaml: expected a revision of Git before the colon, got 'nothing'\n"
    code, _, said = compare({}, old="HEAD:rules/none.yaml")
    assert code == 2
    assert said == "error: HEAD:rules/none.yaml: expected a rule file in that revision, got none\n"
    assert compare({}, old="--output=x:rules/routes.yaml")[0] == 2
    assert compare({}, old="HEAD:--output=x/routes.yaml")[0] == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "line", ["no JSON", "[]", '{"id": 1}', a_line(1, BODIES[0]).replace('"body": "', '"body": 1, "x": "')]
)
def test_a_line_that_is_no_event_is_told_with_its_number(compare: Compare, tmp_path: Path, line: str) -> None:
    (tmp_path / "bad").write_text(a_line(0, BODIES[0]) + "\n" + line + "\n")
    code, _, said = compare({}, "--events", "bad")
    assert code == 2
    assert said == "error: bad:2: expected an event as `gateway events show --json` prints it, got something else\n"


def test_a_summary_is_written_for_a_pull_request(compare: Compare, tmp_path: Path) -> None:
    compare({"type: order.*": "type: order.paid"}, "--events", "events", "--markdown", "out.md")
    assert (
        (tmp_path / "out.md").read_text()
        == """### What these rules change

3 events: 1 of 2 routes changed; 1 without a route.

| route | before | after | gained | lost | changed |
|---|--:|--:|--:|--:|--:|
| order | 2 | 1 | 0 | 1 | 0 |

<details><summary>order</summary>

```
lost: evt_1 to erp
```

</details>
"""
    )


def test_the_events_of_the_log_are_compared(compare: Compare, tmp_path: Path) -> None:
    topics = Topics("gateway.")

    async def write() -> None:
        log = await EmbeddedLog.open(tmp_path / "gateway.db", owner=True)
        await log.create(specs_of(load_rules(tmp_path / "old.yaml", environ={}, resolve=False), topics))
        for number, body in enumerate(BODIES):
            event = an_event(id=f"evt_{number}", source="shop", type=json.loads(body)["kind"], body=body.encode())
            await log.append(topics.events("shop"), key=b"", value=event.body, headers=encode_event(event))
        await log.append(topics.events("shop"), key=b"", value=b"", headers=[("gw_v", b"1")])
        await log.close()

    asyncio.run(write())
    arguments = ("--since", "1h", "--log", f"sqlite:///{tmp_path / 'gateway.db'}")
    code, routes, said = compare({"type: order.*": "type: order.paid"}, *arguments)
    assert code == 1
    assert counts(routes["order"]) == (2, 1, 0, 1, 0)
    assert said.endswith("3 events: 1 of 2 routes changed; 1 without a route\n")


def test_many_events_take_no_long_time(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "many").write_text("".join([a_line(number, BODIES[number % 3]) + "\n" for number in range(5_000)]))
    began = time.process_time()
    _, routes, _ = compare({"{id: ": "{n: 1, id: "}, "--events", "many")
    assert counts(routes["order"]) == (3334, 3334, 0, 0, 3334)
    assert time.process_time() - began < 10  # twice, once for each output
