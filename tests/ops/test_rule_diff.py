"""`gateway diff`: what a change of the rules does to events that there were."""

import asyncio
import io
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from gateway.cli import main
from gateway.commands.base import Invocation
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from gateway.ops.rule_diff import RuleDiff
from gateway.required_topics import specs_of
from gateway.rules.load import load_rules
from tests.builders import an_event
from tests.certificates import Authority

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
        return code, {line.pop("route"): line for line in lines if "route" in line}, said

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
    reordered = (
        'sources:  # the same\n  shop: {verify: {secrets: ["${SECRET}"], header: X-Token, scheme: token}, id: body.id, '
    )
    same = {RULES[RULES.index("sources:") : RULES.index("type: body.kind")]: reordered, ", id: body.id}": "}"}
    assert compare(same) == (code, routes, said)


def test_what_a_route_gains_and_loses_is_counted_and_shown(compare: Compare) -> None:
    code, routes, said = compare({"type: order.*": "type: [order.paid, ping]"})
    assert code == 1
    assert counts(routes["order"]) == (2, 2, 1, 1, 0)
    assert routes["order"]["samples"] == {"gained": [["evt_2", ["to erp"]]], "lost": [["evt_1", ["to erp"]]]}
    assert "lost order: evt_1 to erp\ngained order: evt_2 to erp\nchanged: route order: match\n" in said
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
    (folder / "elsewhere").symlink_to("/nowhere/at/all")  # no business of the rules
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
    expected = "expected a rule file in that revision, by its path from the repository's root"
    assert said == f"error: HEAD:rules/none.yaml: {expected}, got none\n"
    code, _, said = compare({}, old="HEAD:routes.yaml")
    assert (code, said) == (2, f"error: HEAD:routes.yaml: {expected}, got none\n")
    code, _, said = compare({}, old="HEAD:rules")
    assert (code, said) == (2, f"error: HEAD:rules: {expected}\n")
    code, _, said = compare({}, old=f"HEAD:{folder}/routes.yaml")
    assert code == 2
    assert said.endswith(": expected a path from the repository's root after the colon, got an absolute one\n")
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
    assert said == "error: bad:2: expected an event as `gateway events show --json` prints it\n"


def test_a_summary_is_written_for_a_pull_request(compare: Compare, tmp_path: Path) -> None:
    compare({"type: order.*": "type: order.paid"}, "--events", "events", "--markdown", "out.md")
    assert (
        (tmp_path / "out.md").read_text()
        == """### What these rules change

3 events: 1 of 2 routes changed; 1 without a route.

- changed: route order: match

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


def test_an_event_that_the_ingress_would_refuse_loses_its_deliveries(compare: Compare, tmp_path: Path) -> None:
    bodies = [body.replace("{", '{"meta": {}, ', 1) for body in BODIES]
    (tmp_path / "events").write_text("\n".join([a_line(number, body) for number, body in enumerate(bodies)]))
    code, routes, said = compare({"type: body.kind": "type: body.meta"})
    assert code == 1
    assert counts(routes["order"]) == (2, 0, 0, 2, 0)
    assert counts(routes["told"]) == (2, 0, 0, 2, 0)
    refusal = "type: body.meta: expected a string or number, got a mapping"
    assert f"lost order: evt_0 to erp\n  the ingress would answer 400 (expression_error): {refusal}\n" in said
    assert said.endswith(
        "3 events: 2 of 2 routes changed; 0 without a route, 1 before; 3 that the ingress would refuse\n"
    )


def test_an_event_that_both_would_refuse_is_as_it_was_stored(compare: Compare, tmp_path: Path) -> None:
    """An item of a request with several events may be read otherwise than the request was."""
    (tmp_path / "events").write_text(a_line(0, '{"kind": "order.paid", "id": {}}'))
    code, routes, _ = compare({"type: body.kind,": "type: \"'order.' + body.kind\","})
    assert code == 1
    assert counts(routes["order"]) == (1, 1, 0, 0, 0)


def test_an_event_without_an_identity_keeps_its_id(compare: Compare, tmp_path: Path) -> None:
    sampled = {", id: body.id": "", "{name: order, ": "{name: order, sample: 50%, ", "${{ body.id }}": "${{ id }}"}
    rules = RULES
    for before, after in sampled.items():
        rules = rules.replace(before, after)
    (tmp_path / "sampled.yaml").write_text(rules)
    (tmp_path / "events").write_text("".join([a_line(number, BODIES[0]) + "\n" for number in range(40)]))
    _, routes, _ = compare(sampled | {"type: body.kind": "type: body.kind + ''"}, old="sampled.yaml")
    [number] = {routes["order"][key] for key in ("before", "after")}
    assert counts(routes["order"]) == (number, number, 0, 0, 0)
    assert number not in {0, 40}


def test_that_a_destination_is_signed_is_a_change(compare: Compare) -> None:
    signed = 'url: "https://chat.example/in", sign: {secrets: ["${SIGN}"]}'
    code, routes, said = compare({'url: "https://chat.example/in"': signed})
    assert code == 1
    assert counts(routes["told"]) == (2, 2, 0, 0, 1)
    for name in ("id", "timestamp", "signature"):
        assert f'  request.headers.webhook-{name}: was none, is "***"\n' in said


OAUTH2 = 'auth: {oauth2: {token_url: "https://token.example/", client_id: s3cret, client_secret: s3cret}}'


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", OAUTH2, "auth: was none, is oauth2"),
        (OAUTH2, "", "auth: was oauth2, is none"),
        (OAUTH2, OAUTH2.replace("s3cret", "s3cret2"), "auth: was oauth2, is another oauth2"),
        ("", 'proxy: "http://s3cret.example:1"', "proxy: was none, is proxy"),
        ('proxy: "http://s3cret:1"', 'proxy: "http://s3cret:2"', "proxy: was proxy, is another proxy"),
        ("", "tls: {ca: AUTHORITY}", "tls: was none, is tls"),
    ],
)
def test_how_a_destination_is_reached_is_a_change(
    compare: Compare, tmp_path: Path, old: str, new: str, told: str
) -> None:
    chat = 'chat: {url: "https://chat.example/in"'
    (tmp_path / "other.yaml").write_text(RULES.replace(chat, f"{chat}, {old}"))
    new = new.replace("AUTHORITY", json.dumps(Authority().pem))
    code, routes, said = compare({chat: f"{chat}, {new}"}, old="other.yaml")
    assert code == 1
    assert counts(routes["told"]) == (2, 2, 0, 0, 1)
    assert f"changed told: evt_1 to chat\n  {told}\n" in said
    assert "s3cret" not in said


RECIPES = sorted((Path(__file__).parents[2] / "docs/recipes").glob("*.yaml"))
CHAT, TOLD, SHOP = 'in"}', "to: [erp, chat]}", "id: body.id}"
LISTED = {
    (CHAT, 'in", timeout: 5s}'): "destination chat: timeout",
    (CHAT, 'in", rate: 5/s}'): "destination chat: rate",
    (CHAT, 'in", concurrency: 5}'): "destination chat: concurrency",
    (CHAT, 'in", on_gone: pause}'): "destination chat: on_gone",
    (TOLD, "to: [erp, chat], retry: {max_attempts: 3}}"): "route told: retry",
    (TOLD, "to: [erp, chat], debounce: {key: body.id, quiet: 30s}}"): "route told: retry, order, debounce",
    (TOLD, "to: [erp, chat], delay: 5m}"): "route told: delay",
    (SHOP, "id: body.id, path: /in/elsewhere}"): "source shop: path",
    (SHOP, "id: body.id, dedupe: 1h}"): "source shop: dedupe",
    (SHOP, "id: body.id, limits: {rate: 5/s}}"): "source shop: limits",
    (SHOP, "id: body.id, split: body.items}"): "source shop: split",
    (SHOP, "id: body.id, respond: {status: 200}}"): "source shop: respond",
    ("header: X-Token", "header: X-Other"): "source shop: verify",
    ("routes:", "egress: {private: refuse}\nroutes:"): "egress: private",
}


@pytest.mark.parametrize(("before", "after", "told"), [(*pair, told) for pair, told in LISTED.items()])
def test_what_no_request_shows_is_listed(
    compare: Compare, before: str, after: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = compare({before: after}, "--events", "events", "--markdown", "out.md")
    assert code == 1
    assert said.endswith(f"\nchanged: {told}\n3 events: the same deliveries; 1 without a route\n".removeprefix("\n"))
    assert f"\n- changed: {told}\n" in Path("out.md").read_text()
    main(["diff", "old.yaml", "new.yaml", "--events", "events", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "rules": {"added": [], "changed": [told], "removed": []}
    }


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('auth: {bearer: {token: "${A}"}}', 'auth: {bearer: {token: "${B}"}}', "auth"),
        ('sign: {secrets: ["${A}"]}', 'sign: {secrets: ["${B}"]}', "sign"),
        ('tls: {ca: "${file:a.pem}"}', 'tls: {ca: "${file:b.pem}"}', "tls"),
        ("rate: 1/s", 'rate: 2/s, proxy: "${A}"', "rate, proxy"),
    ],
)
def test_another_reference_is_listed(compare: Compare, old: str, new: str, key: str) -> None:
    """Though neither is resolved."""
    Path("other.yaml").write_text(RULES.replace(CHAT, f'in", {old}}}'))
    code, _, said = compare({CHAT: f'in", {new}}}'}, old="other.yaml")
    assert (code, said.splitlines()[-2]) == (1, f"changed: destination chat: {key}")
    code, _, said = compare({"${SECRET}": "${file:secret}"})
    assert (code, said.splitlines()[-2]) == (1, "changed: source shop: verify")
    inline = "to: [erp, {name: own, url: 'https://own.example', auth: {basic: {username: a, password: '${A}'}}}]"
    Path("other.yaml").write_text(RULES.replace("to: [erp, chat]", inline))
    code, _, said = compare({"to: [erp, chat]": inline.replace("${A}", "${B}")}, old="other.yaml")
    assert (code, said.splitlines()[-2]) == (1, "changed: destination own: auth")


def test_names_that_come_and_go_are_listed(compare: Compare) -> None:
    _, _, said = compare({"name: told": "name: tell"})
    assert "added: route tell\nremoved: route told\n" in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_same_rules_differ_in_nothing(path: Path) -> None:
    old, new = [load_rules(path, environ={}, resolve=False, reads_secrets=False) for _ in range(2)]
    assert not RuleDiff(old, new, now=0.0).is_changed


def test_a_gained_delivery_that_cannot_be_made_is_told(compare: Compare) -> None:
    _, routes, said = compare({"type: order.*": "type: [order.*, ping]", "${{ body.id }}": "${{ body.kind.x }}"})
    assert counts(routes["order"]) == (2, 3, 1, 0, 2)
    assert "gained order: evt_2 to erp (dead letter: request.body: body.kind.x isn't there" in said


def test_a_dead_letter_is_shown_though_there_are_many_others(compare: Compare, tmp_path: Path) -> None:
    bodies = [*(['{"kind": "ping", "id": 1}'] * 5), '{"kind": "ping"}', '{"kind": "ping", "id": 1}']
    (tmp_path / "events").write_text("".join([a_line(number, body) + "\n" for number, body in enumerate(bodies)]))
    _, routes, _ = compare({"type: order.*": "type: ping"})
    assert counts(routes["order"]) == (0, 7, 7, 0, 0)
    samples = routes["order"]["samples"]
    assert isinstance(samples, dict)
    assert [name for name, _ in samples["gained"]] == ["evt_5", "evt_0", "evt_1"]


def test_the_items_of_a_delayed_split_are_compared(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "events").write_text(a_line(0, '{"kind": "order.paid", "id": 1, "rows": [{"n": 1}, {"n": 2}]}'))
    late = {"{name: order, ": "{name: order, delay: 5m, split: body.rows, ", "${{ body.id }}": "${{ item.n }}"}
    rules = RULES
    for before, after in late.items():
        rules = rules.replace(before, after)
    (tmp_path / "late.yaml").write_text(rules)
    _, routes, said = compare({**late, "${{ body.id }}": "${{ item.n + 1 }}"}, old="late.yaml")
    assert counts(routes["order"]) == (2, 2, 0, 0, 2)
    assert "changed order: evt_0 to erp, item 1\n  request.body.id: was 2, is 3\n" in said


def test_no_events_show_nothing(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "events").write_text("\n")
    assert compare({}) == (2, {}, "error: no events were compared\n")
    changed = "changed: destination chat: timeout\n"
    code, _, said = compare({CHAT: 'in", timeout: 5s}'}, "--events", "events", "--markdown", "out.md")
    assert (code, said) == (2, f"{changed}error: no events were compared\n")
    assert (tmp_path / "out.md").read_text().endswith(f"\nno events were compared.\n\n- {changed}")


def test_what_stops_a_comparison_is_no_change(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    code, _, said = compare({}, "--events", "folder")
    assert (code, said) == (2, "error: folder: expected a file of events, got: is a directory\n")
    code, _, said = compare({}, "--events", "events", "--markdown", "no/such/x")
    assert code == 2
    assert said.endswith("\nerror: --markdown: expected a file to write, no/such/x, got no such file or directory\n")

    def unavailable(_: Invocation) -> NoReturn:
        raise LogUnavailableError("no broker responds")

    monkeypatch.setattr("gateway.commands.diff.opened_log", unavailable)
    assert compare({}, "--since", "1h") == (2, {}, "error: no broker responds\n")


def test_two_long_values_are_shown_where_they_differ(compare: Compare) -> None:
    long = "x" * 300
    _, _, said = compare({'"${{ body.id }}"': f'"{long}${{{{ body.id }}}}"'})
    assert f'request.body.id: was 1, is "{long[:199]}…\n' in said
    (Path("other.yaml")).write_text(RULES.replace('"${{ body.id }}"', f'"{long}${{{{ body.id }}}}"'))
    _, _, said = compare({'"${{ body.id }}"': f'"{long}-${{{{ body.id }}}}"'}, old="other.yaml")
    assert f'request.body.id: was …{"x" * 40}1", is …{"x" * 40}-1"\n' in said


def test_what_is_left_out_of_many_differences_is_counted(compare: Compare) -> None:
    many = ", ".join([f"a{number}: 1" for number in range(12)])
    _, _, said = compare({'{id: "${{ body.id }}"}': f'{{id: "${{{{ body.id }}}}", {many}}}'})
    assert "  request.body.a7: was none, is 1\n  … and 4 more\n" in said


def test_an_event_may_be_nested_deeply(compare: Compare, tmp_path: Path) -> None:
    nested = "[" * 1000 + "1" + "]" * 1000
    line = a_line(0, '{"kind": "ping", "by": 1, "deep": 7}')
    (tmp_path / "events").write_text(line.replace("7", nested))
    code, routes, _ = compare({"https://chat.example/in": "https://chat.example/new"})
    assert code == 1
    assert counts(routes["told"]) == (2, 2, 0, 0, 1)


def test_a_summary_shows_what_turns_the_direction_of_a_text(compare: Compare, tmp_path: Path) -> None:
    body = '{"kind": "order.paid", "id": "\\u202eevil\\u2066\\u061c\\u200b \\u3000\\u6ce8"}'
    (tmp_path / "turned").write_text(a_line(0, body) + "\n")
    compare({"body: {id:": "body: {number:"}, "--events", "turned", "--markdown", "out.md")
    written = (tmp_path / "out.md").read_text()
    assert r"\u202eevil\u2066\u061c\u200b" in written
    assert "\u3000\u6ce8" in written
    assert not [each for each in written if each in "\u202e\u2066\u061c\u200b"]


HIDING = {"id: body.id}": "id: body.id, redact: [body.card, body.person, body.ill]}"}
PATIENT = '{"kind": "order.paid", "id": 1, "card": "4242424242424242", "ill": true, "person": {"eve@example.com": 7}}'


@pytest.mark.parametrize("by", ["old", "new"])
def test_what_either_rules_hide_of_an_event_is_shown_nowhere(compare: Compare, tmp_path: Path, by: str) -> None:
    (tmp_path / "hiding.yaml").write_text(RULES.replace(*next(iter(HIDING.items()))) if by == "old" else RULES)
    (tmp_path / "patient").write_text(a_line(0, PATIENT) + "\n")
    wide = f'"{"x" * 195}${{{{ body.card }}}}"'
    changes = {"{id: ": f'{{card: "${{{{ body.card }}}}", wide: {wide}, id: '} | ({} if by == "old" else HIDING)
    arguments = ("--events", "patient", "--markdown", "out.md")
    code, routes, said = compare(changes, *arguments, old="hiding.yaml")
    assert code == 1
    assert f"""  request.body.card: was none, is "***"\n  request.body.wide: was none, is "{"x" * 195}***"\n""" in said
    for shown in (said, str(routes), (tmp_path / "out.md").read_text()):
        assert "4242" not in shown
        assert "***" in shown


def test_of_a_body_that_is_delivered_as_it_came_what_is_hidden_is_not_shown(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "patient").write_text(a_line(0, PATIENT) + "\n")
    own = ', request: {body: {id: "${{ body.id }}"}}}'
    (tmp_path / "as_it_came.yaml").write_text(RULES.replace(own, "}"))
    changes = HIDING | {'{id: "${{ body.id }}"}': "{id: 2, person: {name: jo}}"}
    _, routes, said = compare(changes, "--events", "patient", old="as_it_came.yaml")
    assert said[said.index("  request.body.kind") : said.index("changed: ")] == (
        '  request.body.kind: was "order.paid", is none\n'
        "  request.body.id: was 1, is 2\n"
        '  request.body.card: was "[redacted]", is none\n'
        '  request.body.ill: was "[redacted]", is none\n'
        '  request.body.person: was "[redacted]", is "[redacted]"\n'
        '  request.body.person.name: was none, is "jo"\n'
    )
    assert "eve@example.com" not in str(routes)


def test_why_a_delivery_is_not_made_is_hidden_of_an_event_whose_hidden_values_are_not_all_known(
    compare: Compare, tmp_path: Path
) -> None:
    cards = {"kind": "ping", "id": 1, "by": "jo", "card": [*range(1001)]}
    (tmp_path / "cards").write_text(a_line(0, json.dumps(cards)) + "\n")
    hiding = {"id: body.id}": "id: body.id, redact: [body.card]}"}
    gained = {"type: order.*": "type: ping", "${{ body.id }}": "${{ body.kind.x }}"}
    _, routes, _ = compare(hiding | gained, "--events", "cards")
    assert routes["order"]["samples"] == {"gained": [["evt_0", ["to erp (dead letter: [redacted])"]]]}
    _, routes, _ = compare(hiding | {"type: body.kind": "type: body.card"}, "--events", "cards")
    assert routes["told"]["samples"] == {
        "lost": [["evt_0", ["to erp", "[redacted]"]], ["evt_0", ["to chat", "[redacted]"]]]
    }


def test_events_are_read_from_stdin(compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (tmp_path / "events").read_bytes()

    class Stdin:
        """A new one for each command: it is read to its end."""

        encoding = "utf-8"

        @property
        def buffer(self) -> io.BytesIO:
            return io.BytesIO(lines)

    monkeypatch.setattr("sys.stdin", Stdin())
    code, routes, said = compare({"type: order.*": "type: order.paid"}, "--events", "-")
    assert (code, counts(routes["order"])) == (1, (2, 1, 0, 1, 0))
    assert said.endswith("3 events: 1 of 2 routes changed; 1 without a route\n")


def test_a_revision_alone_is_told_how_to_name_a_file_of_it(compare: Compare) -> None:
    code, _, said = compare({}, old="HEAD")
    assert code == 2
    assert said == "error: HEAD: expected a rule file, or REVISION:PATH of Git as in HEAD:routes.yaml, got no file\n"
