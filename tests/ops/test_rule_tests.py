"""`gateway test`: what passes, and what it says of what doesn't."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cli import main
from gateway.ops.rule_tests import differences

RULES = """
version: 1
sources:
  shop: {verify: {scheme: token, header: X-Token, secrets: ["${SECRET}"]}, type: body.kind}
  forms: {verify: {scheme: none}}
destinations:
  erp: {url: "${ERP_URL}"}
  chat: {url: "https://chat.example/in?a=1", headers: {X-Key: "${KEY:-none}"}}
routes:
  - name: order
    from: shop
    match: {type: order.paid}
    to: [erp, chat]
    request:
      {method: PUT, path: "/${{ body.id }}", query: {b: 2}, body: {id: "${{ body.id }}", n: 1, l: [1, {a: true}]}}
  - {name: told, from: shop, when: "body.by != ''", to: chat, request: {form: {by: "${{ body.by }}", t: [a, b]}}}
  - {name: raw, from: forms, to: chat}
"""
PAID = "{kind: order.paid, id: a/b}"

Try = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def attempt(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Try:
    """Return a function that tries tests, and returns the exit code and the lines of both outputs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERP_URL", "https://of-this-machine.example")
    (tmp_path / "tests").mkdir()

    def attempt(tests: str, *arguments: str, rules: str = RULES) -> tuple[int, list[str]]:
        (tmp_path / "routes.yaml").write_text(rules)
        (tmp_path / "tests" / "shop.yaml").write_text(f"tests:\n{tests}")
        code = main(["test", *arguments])
        out, err = capsys.readouterr()
        return code, (out + err).splitlines()

    return attempt


def a_test(expect: str, event: str = f"{{source: shop, body: {PAID}}}", name: str = "t") -> str:
    return f"  - {{name: {name}, event: {event}, expect: {expect}}}\n"


WHOLE = "{id: a/b, n: 1, l: [1, {a: true}]}"


@pytest.mark.parametrize(
    "expect",
    [
        "{routes: [order]}",
        "{routes: order}",
        "{requests: [{route: order, to: erp, method: PUT, url: '${ERP_URL}/a%2Fb?b=2'}]}",
        "{requests: [{route: order, to: chat, url: 'https://chat.example/in/a%2Fb?a=1&b=2'}]}",
        "{requests: [{route: order, to: chat, headers: {x-key: none, X-Other: null, content-type: application/json}}]}",
        f"{{requests: [{{route: order, to: erp, body: {WHOLE}}}]}}",
        "{requests: [{route: order, to: erp, body_has: {l: [1, {}]}}]}",
        """{requests: [{route: order, to: erp, body: '{"id":"a/b","n":1,"l":[1,{"a":true}]}'}]}""",
    ],
)
def test_what_is_so_passes(attempt: Try, expect: str) -> None:
    code, told = attempt(a_test(expect))
    assert (code, told[-1]) == (0, "routes.yaml: 1 test: ok")


@pytest.mark.parametrize(
    ("expect", "difference"),
    [
        ("{routes: []}", "routes: expected no match of order, got: matched"),
        ("{routes: [order, told]}", "routes: expected told to match, got: when: body.by isn't there"),
        ("{routes: [order, raw]}", "routes: expected raw to match, got: from: expected forms, got shop"),
        ("{routes: [ordr]}", "routes: unknown route 'ordr', did you mean 'order'?"),
        ("{requests: [{route: ordr}]}", "requests[0].route: unknown route 'ordr', did you mean 'order'?"),
        ("{requests: [{route: order}]}", "requests[0]: expected `to`, one of erp, chat, got none"),
        (
            "{requests: [{route: order, to: er}]}",
            "requests[0].to: expected a destination of order (erp, chat), got 'er'",
        ),
        (
            "{requests: [{route: told}]}",
            "requests[0]: expected a request of told, got none: when: body.by isn't there",
        ),
        ("{requests: [{route: order, to: erp, method: POST}]}", 'requests[0].method: expected "POST", got "PUT"'),
        (
            "{requests: [{route: order, to: erp, url: 'https://x'}]}",
            'requests[0].url: expected "https://x", got "${ERP_URL}/a%2Fb?b=2"',
        ),
        (
            "{requests: [{route: order, to: chat, headers: {X-Key: null}}]}",
            'requests[0].headers.X-Key: expected none, got "none"',
        ),
        (
            "{requests: [{route: order, to: chat, headers: {X-Key: other}}]}",
            'requests[0].headers.X-Key: expected "other", got "none"',
        ),
        (
            "{requests: [{route: order, to: chat, headers: {X-No: other}}]}",
            'requests[0].headers.X-No: expected "other", got none',
        ),
        ("{requests: [{route: order, to: erp, error: gone}]}", 'requests[0].error: expected "gone", got "a request"'),
        (
            "{requests: [{route: order, to: erp, body: {id: a/b, n: 1, l: [1, {a: 1}]}}]}",
            "requests[0].body.l[1].a: expected 1, got true",
        ),
        (
            "{requests: [{route: order, to: erp, body: {id: a/b, l: [1, {a: true}]}}]}",
            "requests[0].body.n: expected none, got 1",
        ),
        (
            "{requests: [{route: order, to: erp, body_has: {m: 1}}]}",
            "requests[0].body_has.m: expected 1, got none",
        ),
        (
            "{requests: [{route: order, to: erp, body_has: {l: [1, {}, 2]}}]}",
            "requests[0].body_has.l[2]: expected 2, got none",
        ),
        (
            "{requests: [{route: order, to: erp, body_has: {l: [1]}}]}",
            'requests[0].body_has.l[1]: expected none, got {"a": true}',
        ),
        ("{snapshot: true}", "snapshot: expected one, got none: `gateway test --update` writes it"),
    ],
)
def test_what_is_not_so_is_told(attempt: Try, expect: str, difference: str) -> None:
    code, told = attempt(a_test(expect))
    assert code == 1
    assert told[0] == "failed: tests/shop.yaml:2:5: t"
    assert told[1] == f"  {difference}"
    assert told[-1] == "routes.yaml: 1 test: 1 failed"


def test_a_form_is_compared_by_its_fields(attempt: Try) -> None:
    event = "{source: shop, body: {kind: x, by: 'a&b'}}"
    assert attempt(a_test("{requests: [{route: told, body: {by: a&b, t: [a, b]}}]}", event))[0] == 0
    assert attempt(a_test("{requests: [{route: told, body: by=a%26b&t=a&t=b}]}", event))[0] == 0
    code, told = attempt(a_test("{requests: [{route: told, body: {by: a}}]}", event))
    assert code == 1
    assert told[1:3] == [
        '  requests[0].body.by: expected "a", got "a&b"',
        '  requests[0].body.t: expected none, got ["a", "b"]',
    ]


def test_a_request_that_cannot_be_made_is_expected_by_its_error(attempt: Try) -> None:
    event = "{source: shop, body: {kind: order.paid, id: ''}}"
    expect = "{requests: [{route: order, to: erp, error: 'request.path: expected a segment of a path'}]}"
    assert attempt(a_test(expect, event))[0] == 0
    code, told = attempt(a_test("{requests: [{route: order, to: erp, error: other}]}", event))
    assert code == 1
    assert told[1].startswith('  requests[0].error: expected "other", got "request.path: expected a segment')
    code, told = attempt(a_test("{requests: [{route: order, to: erp, method: PUT}]}", event))
    assert told[1].startswith("  requests[0]: expected a request, got a dead letter (expression_error): request.path")


def test_an_event_that_the_ingress_refuses_fails_its_test(attempt: Try) -> None:
    code, told = attempt(a_test("{routes: []}", "{source: shop, body: 'no JSON'}"))
    assert code == 1
    assert told[1].startswith("  event: the ingress would answer 400 (")
    code, told = attempt(a_test("{routes: []}", "{source: shp}"))
    assert told[1] == "  event.source: unknown source 'shp', did you mean 'shop'?"


def test_an_event_may_be_in_a_file_or_captured(attempt: Try, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"kind": "order.paid", "id": 1}')
    fields = {"source": "shop", "headers": [["X-A", "é"]], "query": "a=1", "body": '{"kind": "order.paid", "id": 2}'}
    (tmp_path / "event.json").write_text(json.dumps(fields))
    expect = "{requests: [{route: order, to: erp, body_has: {id: %d}}]}"
    of_file = a_test(expect % 1, "{source: shop, file: ../body.json}", "a")
    captured = a_test(expect % 2, "{captured: ../event.json}", "b")
    assert attempt(of_file + captured)[0] == 0
    fields["body_base64"] = "eyJraW5kIjogIm9yZGVyLnBhaWQiLCAiaWQiOiAyfQ=="
    (tmp_path / "event.json").write_text(json.dumps(fields))
    assert attempt(captured)[0] == 0
    (tmp_path / "event.json").write_text('{"source": "shop"}')
    code, told = attempt(captured)
    assert code == 2
    assert "tests[0].event.captured: expected what `gateway events show --json` prints of an event" in told[0]


def test_a_snapshot_is_written_compared_and_removed(attempt: Try, tmp_path: Path) -> None:
    test = a_test("{snapshot: true}")
    code, told = attempt(test, "--update")
    assert (code, told[-1]) == (0, "tests/shop.yaml: 1 snapshot written")
    assert attempt(test)[0] == 0
    code, told = attempt(test, rules=RULES.replace("n: 1, l:", "n: 2, l:"))
    assert code == 1
    assert told[1:3] == [f"  snapshot.requests[{number}].body.n: expected 1, got 2" for number in (0, 1)]
    written = json.loads((tmp_path / "tests" / "shop.snapshots.json").read_text())
    assert written["t"]["routes"] == ["order"]
    assert [request["to"] for request in written["t"]["requests"]] == ["erp", "chat"]
    assert attempt(a_test("{routes: order}"), "--update")[0] == 0
    assert not (tmp_path / "tests" / "shop.snapshots.json").exists()


def test_results_are_written_for_ci_systems(attempt: Try, tmp_path: Path) -> None:
    bad = a_test("{routes: ['<a>\\x01&']}", name='"n\\x01o"').replace("'<a>\\x01&'", '"<a>\\x01&"')
    assert attempt(a_test("{routes: order}") + bad, "--junit", "out.xml")[0] == 1
    suite = ET.parse(tmp_path / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    passed, failed = suite
    assert (passed.get("name"), passed.get("file"), passed.get("line"), len(passed)) == ("t", "tests/shop.yaml", "2", 0)
    assert failed.get("name") == "n\N{REPLACEMENT CHARACTER}o"
    assert "unknown route '<a>" in (failed[0].text or "")


def test_routes_without_a_test_are_named(attempt: Try) -> None:
    _, told = attempt(a_test("{routes: order}"))
    assert told[0] == "2 of 3 routes without a test: told, raw"


def test_some_tests_are_chosen_by_their_names(attempt: Try) -> None:
    tests = a_test("{routes: order}", name="good one") + a_test("{routes: []}", name="bad one")
    assert attempt(tests, "--only", "good")[1] == ["routes.yaml: 1 test: ok"]
    code, told = attempt(tests, "--only", "none")
    assert code == 2
    assert told[0].startswith("error: routes.yaml: expected tests with 'none' in their name in the rules or in tests/*")
    assert attempt(tests, "--only", "good", "--update")[0] == 2


def test_each_result_is_a_line_of_json(attempt: Try) -> None:
    _, told = attempt(a_test("{routes: order}") + a_test("{routes: []}", name="b"), "--json")
    assert [json.loads(line) for line in told] == [
        {"name": "t", "where": "tests/shop.yaml:2:5", "differences": []},
        {
            "name": "b",
            "where": "tests/shop.yaml:3:5",
            "differences": ["routes: expected no match of order, got: matched"],
        },
    ]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            a_test("{routes: []}").replace("name:", "nme:"),
            "tests[0].nme: unknown key 'nme', did you mean 'name'?",
        ),
        (a_test("{}"), "tests[0].expect: expected what should happen (routes, requests or snapshot), got nothing"),
        (a_test("{snapshot: false}"), "tests[0].expect.snapshot: expected true, got false"),
        (a_test("{routes: []}", "{}"), "tests[0].event: expected the key 'source', got none"),
        (
            a_test("{routes: []}", "{source: shop, body: a, file: b}"),
            "tests[0].event.file: expected one of body, file and captured, got body and file",
        ),
        (
            a_test("{routes: []}", "{source: shop, file: none.json}"),
            "tests[0].event.file: expected a file at tests/none.json, got no such file or directory",
        ),
        (
            a_test("{routes: []}", "{source: shop, headers: {X: 1}}"),
            "tests[0].event.headers.X: expected a string, got 1",
        ),
        (
            a_test("{routes: order}") + a_test("{routes: order}"),
            "tests: expected each test's name once in a file, got 't' again (first at tests/shop.yaml:2:5)",
        ),
    ],
)
def test_a_test_that_cannot_be_read_is_told_with_its_place(attempt: Try, test: str, message: str) -> None:
    code, told = attempt(test)
    assert code == 2
    assert any(line.startswith("error: tests/shop.yaml:") and line.endswith(message) for line in told), told


def test_a_mistake_in_a_test_does_not_make_rules_unusable(attempt: Try, capsys: pytest.CaptureFixture[str]) -> None:
    broken = RULES + 'tests: [{name: 5, event: "${UNSET}"}]\n'
    code, told = attempt(a_test("{routes: order}"), rules=broken)
    assert code == 2
    assert any("routes.yaml:" in line and "tests[0]" in line for line in told)
    assert main(["check"]) == 0
    assert "tests" not in capsys.readouterr().out


def test_no_file_of_a_secret_is_read(attempt: Try, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret")
    rules = RULES.replace("${KEY:-none}", "${file:key}")
    code, told = attempt(a_test("{requests: [{route: order, to: chat, headers: {X-Key: other}}]}"), rules=rules)
    assert code == 1
    assert "s3cret" not in "".join(told)
    assert attempt(a_test("{snapshot: true}"), "--update", rules=rules)[0] == 0
    assert "s3cret" not in (tmp_path / "tests" / "shop.snapshots.json").read_text()


def test_the_tests_of_our_own_rules_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["test", "routes.yaml"]) == 0
    assert "without a test" not in capsys.readouterr().out


FAILING = RULES.replace("""when: "body.by != ''",""", "when: body.n < 3,")
"""Whose `told` compares, and has a form with a field."""


@pytest.mark.parametrize(
    ("expect", "body", "difference"),
    [
        (
            "{routes: told}",
            "{n: three}",
            "routes: expected told to make a request, got a dead letter (expression_error): when: failed: body.n < 3: ",
        ),
        (
            "{routes: told}",
            "{n: 1}",
            "routes: expected told to make a request, got a dead letter (expression_error): request.form: body.by ",
        ),
        ("{routes: told, requests: [{route: told, error: 'when: failed'}]}", "{n: three}", ""),
        ("{routes: told, requests: [{route: told, error: body.by isn't there}]}", "{n: 1}", ""),
        ("{routes: told}", "{n: 1, by: jo}", ""),
        ("{requests: [{route: told, error: body.n < 3}]}", "{n: three}", ""),
        (
            "{routes: told, requests: [{route: told, error: other}]}",
            "{n: 1}",
            'requests[0].error: expected "other", got "request.form: body.by isn\'t there',
        ),
    ],
)
def test_a_route_that_is_expected_makes_a_request_or_the_test_says_that_it_cannot(
    attempt: Try, expect: str, body: str, difference: str
) -> None:
    code, told = attempt(a_test(expect, f"{{source: shop, body: {body}}}"), rules=FAILING)
    assert code == bool(difference)
    found = [line.strip() for line in told if line.startswith("  ")]
    assert len(found) == bool(difference)
    assert "".join(found).startswith(difference)
    if difference.startswith("routes"):
        assert found[0].endswith(" (`requests: [{route: told, error: …}]` expects it)")


def test_each_destination_of_a_dead_letter_is_expected(attempt: Try) -> None:
    event = "{source: shop, body: {kind: order.paid, id: ''}}"
    code, told = attempt(a_test("{routes: order, requests: [{route: order, to: erp, error: request.path}]}", event))
    assert code == 1
    (line,) = [line for line in told if line.startswith("  ")]
    assert line.endswith("(`requests: [{route: order, to: chat, error: …}]` expects it)")


ITEMS = RULES.replace("when: \"body.by != ''\"", "split: body.rows").replace("{by: ", "{it: '${{ item.by }}', by: ")


@pytest.mark.parametrize(
    ("expect", "rows", "difference"),
    [
        ("{routes: told}", "[{by: a}, {}, {}]", "routes: expected told to make a request, got a dead letter"),
        ("{routes: told, requests: [{route: told, item: 1, error: item.by isn't there}]}", "[{by: a}, {}, {}]", ""),
        ("{routes: told}", "[]", ""),
        (
            "{requests: [{route: told, method: POST}]}",
            "[]",
            "requests[0]: expected a request, got none: its list has no items",
        ),
        (
            "{requests: [{route: told, error: item}]}",
            "[]",
            "requests[0]: expected an error, got none: its list has no items",
        ),
    ],
)
def test_the_items_of_a_split_are_expected(attempt: Try, expect: str, rows: str, difference: str) -> None:
    code, told = attempt(a_test(expect, f"{{source: shop, body: {{by: x, rows: {rows}}}}}"), rules=ITEMS)
    assert code == bool(difference)
    found = [line.strip() for line in told if line.startswith("  ")]
    assert len(found) == bool(difference)
    assert "".join(found).startswith(difference)


def test_the_items_of_a_delayed_split_are_requests(attempt: Try) -> None:
    rules = ITEMS.replace("split: body.rows", "split: body.rows, delay: 5m")
    event = "{source: shop, body: {by: x, rows: [{by: a}, {by: b}]}}"
    expect = "{routes: told, requests: [{route: told, item: 1, body_has: {it: b}}]}"
    assert attempt(a_test(expect, event), rules=rules)[0] == 0


def test_a_body_that_the_ingress_splits_is_no_event(attempt: Try, tmp_path: Path) -> None:
    rules = RULES.replace("type: body.kind", "type: body.kind, split: body.items")
    item = '{"kind": "order.paid", "id": 1}'
    whole = f"{{source: shop, body: {{items: [{item}, {item}]}}}}"
    code, told = attempt(a_test("{routes: order}", whole), rules=rules)
    assert code == 1
    assert told[1] == "  event: the ingress makes 2 events of this body (split): pass one of its items as the event"
    assert attempt(a_test("{routes: order}", f"{{source: shop, body: {item}}}"), rules=rules)[0] == 0
    captured = {"source": "shop", "headers": [], "query": "", "body": '{"kind": "order.paid", "id": 1, "items": []}'}
    (tmp_path / "event.json").write_text(json.dumps(captured))
    assert attempt(a_test("{routes: order}", "{captured: ../event.json}"), rules=rules)[0] == 0, "it is an item"


def test_an_event_without_an_identity_has_the_same_id_each_time(attempt: Try) -> None:
    """Otherwise no snapshot of one would ever pass, and a sample would take it now and then."""
    keys = 'sample: 50%, request: {body: {id: "${{ id }}"}}'
    rules = RULES.replace("{name: raw, ", f"{{name: raw, {keys}, ")
    tests = "".join([a_test("{snapshot: true}", f"{{source: forms, body: {{n: {n}}}}}", f"t{n}") for n in range(20)])
    assert attempt(tests, "--update", rules=rules)[0] == 0
    assert attempt(tests, rules=rules)[0] == 0
    written = json.loads(Path("tests/shop.snapshots.json").read_text()).values()
    assert 2 < len({request["body"]["id"] for each in written for request in each["requests"]}) < 18


def test_a_snapshot_has_dead_letters_waits_and_that_a_request_is_signed(attempt: Try, tmp_path: Path) -> None:
    rules = FAILING.replace("to: chat, request: {form", "to: chat, delay: 5m, request: {form")
    rules = rules.replace('headers: {X-Key: "${KEY:-none}"}', 'sign: {secrets: ["whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2Vj"]}')
    failing = a_test("{snapshot: true}", "{source: shop, body: {n: three}}", "a")
    late = a_test("{snapshot: true}", "{source: shop, body: {n: 1, by: jo}}", "b")
    plain = a_test("{snapshot: true}", "{source: forms, headers: {webhook-id: own}, body: x}", "c")
    _, told = attempt(failing + late + plain, "--update", rules=rules)
    assert told[-1] == "tests/shop.yaml: 3 snapshots written; 1 request is a dead letter"
    assert attempt(failing + late + plain, rules=rules)[0] == 0
    written = json.loads((tmp_path / "tests" / "shop.snapshots.json").read_text())
    (request,) = written["a"]["requests"]
    assert request["error"].startswith("when: failed: body.n < 3")
    assert written["b"]["waits"] == {"told": "delivered 5m after its receipt"}
    signed = [header for header in written["b"]["requests"][0]["headers"] if header.startswith("webhook-")]
    assert signed == ["webhook-id: ***", "webhook-timestamp: ***", "webhook-signature: ***"]
    assert "waits" not in written["a"], "what is dead waits for nothing"
    assert "waits" not in written["c"]
    code, told = attempt(plain, rules=FAILING)
    assert code == 1
    assert any('got "webhook-id: own"' in line for line in told), "the sender's own are as they are"


def test_an_update_keeps_the_snapshot_of_an_event_that_is_refused(attempt: Try, tmp_path: Path) -> None:
    one, other = a_test("{snapshot: true}"), a_test("{snapshot: true}", "{source: forms, body: x}", "b")
    attempt(one + other, "--update")
    file = tmp_path / "tests" / "shop.snapshots.json"
    before = file.read_text()
    code, told = attempt(one + other, "--update", rules=RULES.replace("type: body.kind", "type: body"))
    assert code == 1
    assert told[-1] == "tests/shop.yaml: 1 snapshot written"
    assert file.read_text() == before
    assert attempt(one.replace("shop", "shp", 1) + other, "--update")[0] == 1
    assert file.read_text() == before


def test_files_of_both_endings_are_read(attempt: Try, tmp_path: Path) -> None:
    (tmp_path / "tests" / "more.yml").write_text("tests:\n" + a_test("{routes: []}", name="other"))
    code, told = attempt(a_test("{routes: order}"))
    assert code == 1
    assert "failed: tests/more.yml:2:5: other" in told
    (tmp_path / "tests" / "shop.yml").write_text("tests:\n" + a_test("{snapshot: true}", name="other"))
    code, told = attempt(a_test("{routes: order}"))
    assert code == 2
    expected = "expected names that differ before the dot, got one file of snapshots: tests/shop.snapshots.json"
    assert told == [f"error: tests/shop.yaml and tests/shop.yml: {expected}"]


def test_results_that_cannot_be_written_are_printed(attempt: Try) -> None:
    code, told = attempt(a_test("{routes: []}"), "--junit", "no/such/x")
    assert code == 2
    assert told[0] == "failed: tests/shop.yaml:2:5: t"
    assert told[-1] == "error: --junit: expected a file to write, no/such/x, got no such file or directory"


def test_two_long_texts_are_shown_where_they_differ(attempt: Try) -> None:
    event = f"{{source: shop, body: {{kind: order.paid, id: {'a' * 300}b}}}}"
    expect = f"{{requests: [{{route: order, to: erp, body_has: {{id: {'a' * 300}c}}}}]}}"
    _, told = attempt(a_test(expect, event))
    assert told[1] == f'  requests[0].body_has.id: expected …{"a" * 40}c", got …{"a" * 40}b"'


def test_values_are_compared_however_deeply_they_are_nested() -> None:
    one: object = 1
    other: object = 2
    for _ in range(50_000):
        one, other = [one], {"a": other}
    assert [*differences("x", [one], [other])] == [
        "x[0]: expected a list that is nested too deeply, got a mapping that is nested too deeply"
    ]
    one, other = 1, 2
    for _ in range(500):
        one, other = [{"a": one}], [{"a": other}]
    assert [*differences("x", one, other)] == [f"x{'[0].a' * 500}: expected 1, got 2"]


def test_results_for_ci_systems_have_every_character_that_xml_has(attempt: Try, tmp_path: Path) -> None:
    name = "\u6ce8\u6587\u3000\u652f\u6255\u3044 \U0001f469\u200d\U0001f4bb\xa0\xe9"
    assert attempt(a_test("{routes: order}", name=f'"{name}"'), "--junit", "out.xml")[0] == 0
    assert ET.parse(tmp_path / "out.xml").getroot()[0][0].get("name") == name
    assert attempt(a_test("{routes: order}", name='"a\\x0b\\uffffb"'), "--junit", "out.xml")[0] == 0
    assert (
        ET.parse(tmp_path / "out.xml").getroot()[0][0].get("name")
        == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"
    )
