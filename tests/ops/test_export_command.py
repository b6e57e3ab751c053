"""`gateway events export`: what is written is read by `gateway test` and `gateway diff`, and has no secret."""

import asyncio
import gzip
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli import main
from gateway.index.index import open_index
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import Event
from gateway.ops.event_export import file_name, withhold
from gateway.ops.rule_diff import events_in
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from tests.builders import an_event

RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: [0123456789abcdef]}}
  crm: {verify: {scheme: token, header: X-Crm-Key, secrets: [sssssssssssssssss]}}
  old: {verify: {scheme: token, field: meta.token, secrets: [ttttttttttttttttt]}}
  link: {verify: {scheme: token, query: k, secrets: [uuuuuuuuuuuuuuuuu]}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: github, match: {type: push}, to: ci, request: {body: {ref: "${{ body.ref }}"}}}
  - {name: all, from: github, to: ci}
"""
TOPICS = Topics()
SOURCES = ("github", "crm", "old", "link")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def store(*events: Event, is_indexed: bool = False) -> None:
    async def work() -> None:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        await log.create(TOPICS.specs([TOPICS.events(source) for source in SOURCES], ()))
        for event in events:
            topic = TOPICS.events(event.source)
            await log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
        if is_indexed:
            async with open_index(Path("index.db"), log, TOPICS) as index:
                await index.refresh()
        await log.close()

    asyncio.run(work())


def a_push(number: int = 1, **fields: Any) -> Event:
    headers = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "push",
        "X-GitHub-Delivery": f"d-{number}",
        "X-Hub-Signature-256": "sha256=" + "ab" * 32,
    }
    given: dict[str, Any] = {"id": f"evt_{number}", "type": "push", "headers": headers, "body": {"ref": f"r{number}"}}
    return an_event(**given | fields)


def test_what_is_exported_is_tested_and_a_change_of_the_rules_shows(run: Run) -> None:
    store(*[a_push(number) for number in range(3)], a_push(7, body=b"\xff\x00binary"))
    code, out, err = run("events", "export", "--to", "out", "--source", "github")
    files = sorted(path.name for path in Path("out").iterdir())
    size = sum(path.stat().st_size for path in Path("out").iterdir())
    assert (code, out) == (0, f"4 events, {size:,} bytes, written to out\n")
    assert err == "withheld of 4 events: header x-hub-signature-256\n"
    assert files == [*[f"github.push.evt_{number}.json" for number in (0, 1, 2, 7)], "tests.yaml"]
    code, _, err = run("test", "routes.yaml", "--tests", "out/tests.yaml", "--update")
    assert "4 snapshots written" in err
    code, out, _ = run("test", "routes.yaml", "--tests", "out/tests.yaml")
    assert (code, out.splitlines()[-1]) == (0, "routes.yaml: 4 tests: ok")
    Path("routes.yaml").write_text(RULES.replace("{ref: ", "{reference: "))
    code, out, _ = run("test", "routes.yaml", "--tests", "out/tests.yaml")
    assert (code, "requests[0].body" in out) == (1, True)


def test_lines_are_read_by_a_comparison_of_rules(run: Run) -> None:
    store(*[a_push(number) for number in range(3)])
    assert run("events", "export", "--to", "out.jsonl")[0] == 0
    read = list(events_in(Path("out.jsonl")))
    assert [(event.id, event.type, json.loads(event.body)) for event in read] == [
        (f"evt_{number}", "push", {"ref": f"r{number}"}) for number in (2, 1, 0)
    ]
    Path("new.yaml").write_text(RULES.replace("type: push", "type: pull"))
    code, out, _ = run("diff", "routes.yaml", "new.yaml", "--events", "out.jsonl", "--json")
    assert code == 1
    assert "build" in out


def test_a_query_of_the_index_says_which(run: Run) -> None:
    store(*[a_push(number) for number in range(5)], is_indexed=True)
    assert run("events", "export", "body.ref:r3", "--to", "out")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["github.push.evt_3.json", "tests.yaml"]
    code, out, err = run("events", "export", "source:github", "--limit", "2", "--to", "more", "--json")
    assert (code, json.loads(out)["events"]) == (0, 2)
    assert "as many as --limit 2 allows" in err
    assert run("events", "export", "source:github", "--source", "github", "--to", "x")[0] == 2
    assert run("events", "export", "sorce:github", "--to", "x")[0] == 2
    assert not Path("x").exists() or not [*Path("x").iterdir()]


def test_what_a_source_hides_is_not_exported_and_the_rest_is_tested_as_rules_read_it(run: Run) -> None:
    hiding = RULES.replace("github: {", "github: {redact: [body.card], ", 1)
    Path("routes.yaml").write_text(hiding)
    form = {"Content-Type": "application/x-www-form-urlencoded", "X-GitHub-Event": "push", "X-GitHub-Delivery": "d"}
    secret = "4242424242424242"
    store(
        a_push(1, body={"ref": "r1", "card": {"number": secret}}),
        a_push(2, headers=form, body=f"ref=r2&card={secret}".encode()),
        a_push(3, type=secret, key=secret, body={"ref": "r3", "card": secret}),
        a_push(4, body=f'{{"card": {secret}'.encode()),
    )
    code, _, err = run("events", "export", "--to", "out.jsonl")
    assert code == 0
    assert "withheld of 4 events: what its source hides (redact)" in err
    assert secret not in Path("out.jsonl").read_text()
    bodies = [event.body for event in events_in(Path("out.jsonl"))]
    assert bodies[0] == b"[redacted]"
    assert [json.loads(body)["ref"] for body in bodies[1:]] == ["r3", "r2", "r1"]
    assert run("events", "export", "--to", "out")[0] == 0
    assert not [path for path in Path("out").iterdir() if secret in path.name or secret in path.read_text()]
    assert run("test", "routes.yaml", "--tests", "out/tests.yaml", "--update")[0] == 0
    assert run("test", "routes.yaml", "--tests", "out/tests.yaml")[0] == 0


def test_nothing_is_overwritten(run: Run) -> None:
    store(a_push(1))
    assert run("events", "export", "--to", "out")[0] == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    code, _, err = run("events", "export", "--to", "out")
    assert (code, err) == (2, "error: --to: expected a folder without tests.yaml, got out: nothing is overwritten\n")
    Path("out/tests.yaml").rename("tests.yaml")
    code, _, err = run("events", "export", "--to", "out")
    assert (code, "expected no file at out/github.push.evt_1.json, got one: nothing is overwritten" in err) == (2, True)
    assert Path("out/github.push.evt_1.json").read_bytes() == before[Path("out/github.push.evt_1.json")]
    Path("lines.jsonl").symlink_to("elsewhere")
    assert run("events", "export", "--to", "lines.jsonl")[0] == 2
    assert not Path("elsewhere").exists()
    assert run("events", "export", "--to", "routes.yaml")[0] == 2
    assert Path("routes.yaml").read_text() == RULES


def test_only_their_owner_reads_the_files(run: Run) -> None:
    store(a_push(1))
    run("events", "export", "--to", "out")
    run("events", "export", "--to", "out.jsonl")
    assert {path.stat().st_mode & 0o777 for path in (*Path("out").iterdir(), Path("out.jsonl"))} == {0o600}
    assert Path("out").stat().st_mode & 0o777 == 0o700


def test_events_of_one_id_are_all_written(run: Run) -> None:
    store(a_push(1), a_push(1, body={"ref": "other"}))
    run("events", "export", "--to", "out")
    written = [json.loads(path.read_bytes())["body"] for path in Path("out").glob("*.json")]
    assert sorted(written) == ['{"ref":"other"}', '{"ref":"r1"}']
    assert run("test", "routes.yaml", "--tests", "out/tests.yaml", "--update")[0] == 0


@given(
    st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=255),
    st.text(max_size=300),
)
def test_a_files_name_is_safe_whatever_the_events_id_and_type(id: str, type: str) -> None:  # noqa: A002 - what they are
    name = file_name(("github", type, id), "gateway.events.github/0@1")
    assert Path(name).name == name
    assert not name.startswith(".")
    assert name.isascii()
    assert len(name) <= 255 - len(".snapshots.json") - 100
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def test_ids_that_differ_in_what_a_name_cannot_have_have_different_files() -> None:
    names = {
        file_name(("github", "push", name), "gateway.events.github/0@1") for name in ("a/b", "a_b", "a:b", "../a_b")
    }
    assert len(names) == 4


# Secrets


def the_rules() -> Rules:
    return load_rules(Path("routes.yaml"), resolve=False)


@pytest.mark.parametrize(
    ("event", "secret", "where"),
    [
        (a_push(), "ab" * 32, "header x-hub-signature-256"),
        (an_event(source="crm", headers={"X-Crm-Key": "sssssssssssssssss"}), "sssssssssssssssss", "header x-crm-key"),
        (an_event(source="gone", headers={"X-Api-Key": "sssssssssssssssss"}), "sssssssssssssssss", "header x-api-key"),
        (an_event(source="gone", headers={"Cookie": "s=1234"}), "1234", "header cookie"),
        (an_event(source="link", query="a=1&k=uuuuuuuuuuuuuuuuu"), "uuuuuuuuuuuuuuuuu", "parameter k"),
        (an_event(source="gone", query="access%5Ftoken=uuuu&b=2"), "uuuu", "parameter access_token"),
        (an_event(source="old", body={"meta": {"token": "ttttttttttttttttt"}, "n": 1}), "ttttttttttttttttt", "body"),
    ],
)
def test_signatures_and_credentials_stay_behind(event: Event, secret: str, where: str) -> None:
    safe = withhold(the_rules(), event)
    assert safe is not None
    assert safe.names == (where,)
    assert secret in repr((event.headers, event.query, event.body))
    assert secret not in repr((safe.event.headers, safe.event.query, safe.event.body))


def test_a_credential_of_the_head_is_masked_in_the_body_too() -> None:
    token = "x" * 15 + "y1"
    event = an_event(headers={"X-Auth-Token": token, "X-Kind": token + "z"}, query=f"to={token}", body={"echo": token})
    safe = withhold(the_rules(), event)
    assert safe is not None
    assert token not in repr((safe.event.headers, safe.event.query, safe.event.body))
    assert json.loads(safe.event.body) == {"echo": "***"}
    assert safe.names == ("header x-auth-token", "body")


TOKEN = "tok-1111222233334444"


@pytest.mark.parametrize("redact", ["", "redact: [headers.x-session-id, query.token], "])
def test_a_credential_is_masked_where_type_key_or_a_files_name_repeats_it(run: Run, redact: str) -> None:
    Path("routes.yaml").write_text(RULES.replace("github: {", f"github: {{{redact}", 1))
    session = "sess-1111222233334444"
    headers = {"X-GitHub-Event": "push", "X-GitHub-Delivery": "d", "X-Session-Id": session}
    store(
        a_push(1, headers=headers, query=f"token={TOKEN}", type=TOKEN, key=session),
        a_push(2, headers=headers | {"X-Session-Id": "short"}, query="token=t1", type="t1", key="short"),
        a_push(3, headers=headers, query=f"token={TOKEN}", type=f"of.{TOKEN}", key="t1"),
    )
    assert run("events", "export", "--to", "out")[0] == 0
    assert run("events", "export", "--to", "out.jsonl")[0] == 0
    written = [path.name + path.read_text() for path in Path("out").iterdir()] + [Path("out.jsonl").read_text()]
    assert not [text for text in written if TOKEN in text or session in text]
    events = {str(event.id): (event.type, event.key) for event in events_in(Path("out.jsonl"))}
    hidden = ("[redacted]", "[redacted]") if redact else ("***", "***")
    assert events == {"evt_1": hidden, "evt_2": hidden, "evt_3": ("of.***", "t1")}  # t1 isn't one of that event


@pytest.mark.parametrize("redact", ["", "redact: [headers.x-session-token], "])
def test_a_credential_that_begins_or_ends_in_a_character_is_masked_and_the_event_written(run: Run, redact: str) -> None:
    Path("routes.yaml").write_text(RULES.replace("github: {", f"github: {{{redact}", 1))
    tail, head = b"\xa9" + b"a" * 16, b"a" * 16 + b"\xc3"  # of an é: its second byte, its first
    texts = ["\u00e9" + "a" * 16, "a" * 16 + "\u00e9"]
    events = [a_push(1, type=texts[0], key=texts[1]), a_push(2, type=texts[1], key=texts[0]), a_push(3)]
    headers = ((b"X-Session-Token", tail), (b"X-Session-Token", head))
    store(*[replace(event, headers=headers) for event in events])
    assert run("events", "export", "--to", "out.jsonl")[:2] == (
        0,
        f"3 events, {size_of('out.jsonl')}, written to out.jsonl\n",
    )
    written = {str(event.id): (event.type, event.key) for event in events_in(Path("out.jsonl"))}
    half = ("\ufffd***", "***\ufffd")
    assert written == {"evt_1": half, "evt_2": half[::-1], "evt_3": ("push", None)}


def size_of(name: str) -> str:
    return f"{Path(name).stat().st_size:,} bytes"


def test_what_a_sender_calls_a_parameter_is_no_line_of_its_own(run: Run) -> None:
    store(a_push(1, query="token%0Aerror:%20disk%20full=1&access%5Ftoken=2&" + "token" * 99 + "=3"))
    code, _, err = run("events", "export", "--to", "out.jsonl")
    assert code == 0
    assert err.splitlines() == [
        "withheld of 1 event: header x-hub-signature-256",
        "withheld of 1 event: parameter 'token\\nerror: disk full'",
        "withheld of 1 event: parameter '" + ("token" * 99)[:59] + "…",
        "withheld of 1 event: parameter access_token",
    ]


@pytest.mark.parametrize("redact", ["", "redact: [body.card], "])
def test_a_credential_of_the_head_is_masked_in_a_compressed_body_too(redact: str) -> None:
    Path("routes.yaml").write_text(RULES.replace("github: {", f"github: {{{redact}", 1))
    headers = {"X-Auth-Token": TOKEN, "Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(f'{{"card": 1, "t": "{TOKEN}"}}'.encode())
    safe = withhold(the_rules(), an_event(source="github", headers=headers | {"Content-Length": "9"}, body=body))
    assert safe is not None
    assert json.loads(safe.event.body)["t"] == "***"
    assert [name for name, _ in safe.event.headers] == [b"Content-Type"]
    other = gzip.compress(b'{"t": 1}')
    safe = withhold(the_rules(), an_event(source="gone", headers=headers, body=other))
    assert safe is not None
    assert safe.event.body == other  # as it came: it has none


def test_a_body_in_which_a_credential_cannot_be_looked_for_is_hidden() -> None:
    for coding, body in (("br", b"\x8b\x03"), ("gzip", b"no gzip")):
        event = an_event(source="gone", headers={"X-Auth-Token": TOKEN, "Content-Encoding": coding}, body=body)
        safe = withhold(the_rules(), event)
        assert safe is not None
        assert (safe.event.body, safe.names) == (b"[redacted]", ("header x-auth-token", "body"))
        without = an_event(source="gone", headers={"Content-Encoding": coding}, body=body)
        safe = withhold(the_rules(), without)
        assert safe is not None
        assert safe.event == without


def test_all_else_is_kept_as_it_was() -> None:
    headers = {
        "Content-Type": "application/json",
        "X-Author": "ann",
        "Idempotency-Key": "k" * 40,
        "X-GitHub-Event": "p",
    }
    event = an_event(headers=headers, query="a=1&b=%20&c", body=b' {"a":  1}\n')
    safe = withhold(the_rules(), event)
    assert safe is not None
    assert (safe.event, safe.names) == (event, ())


def test_an_event_whose_credential_cannot_be_masked_is_left_out_and_told(run: Run) -> None:
    store(an_event(id="evt_1", source="old", body={"meta": {"token": "abc"}}), a_push(2))
    code, out, err = run("events", "export", "--to", "out.jsonl", "--json")
    assert code == 0
    assert json.loads(out)["left_out"] == 1
    assert "left out: 1 event that has a credential in its body that is too short to be masked" in err
    assert [event.id for event in events_in(Path("out.jsonl"))] == ["evt_2"]
