"""The commands, as an operator or a script calls them."""

import asyncio
import errno
import gzip
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from typing_extensions import override

from gateway import commands
from gateway.cli import main
from gateway.commands import COMMANDS
from gateway.commands.base import REGISTERED
from gateway.commands.replaying import DUE
from gateway.engine.control.records import (
    ControlRecord,
    DeadFilter,
    Selection,
    State,
    announcement_key,
    decode,
    tried_name,
)
from gateway.engine.dedupe.index import ENTRIES_KEPT
from gateway.listen_errors import cannot_listen
from gateway.log.base import Commit, Log, Partition, Position
from gateway.log.embedded.lock import Lock
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_delivery, encode_event, event_key
from gateway.log.topics import JOBS_GROUP, Topics
from gateway.model import NO_METADATA, LogLostError, Part, RecordMetadata, SpillReason, event_id
from gateway.ops import silent_sources
from gateway.ops.control_client import ControlClient, Pause, StoredCommand
from gateway.ops.kick_report import parked_besides, parked_text
from gateway.ops.output import Output, rfc3339, when
from gateway.ops.provider_guide import ProviderGuide, provider_guides
from gateway.ops.send import ask_status
from gateway.rules.load import check_rules
from gateway.rules.routing_revision import encode, routing_revision
from gateway.settings import Address
from gateway.verify.presets import PRESETS
from tests.builders import NOW, a_delivery, a_route, an_attempt, an_event
from tests.certificates import Authority
from tests.engine.test_worker import rules_of
from tests.gateway_process import GatewayProcess, free_ports
from tests.interruptible import interruptible
from tests.log.test_embedded import Silent

ROOT = Path(__file__).parent.parent
TOPICS = Topics()
RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}, key: body.repo}
  crm: {verify: {scheme: token, header: X-Token, secrets: [sssssssssssssssss]}, topic: company.crm}
destinations:
  ci: {url: "http://127.0.0.1:1/hook?token=abc"}
routes:
  - {name: build, from: github, match: {type: push}, to: ci}
  - {name: customers, from: crm, to: ci, request: {body: "${{ body.name }}"}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a folder with rules, and leave logging as it was."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GATEWAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("gateway.commands.control.CONFIRMED_WITHIN", 0.0)
    monkeypatch.setattr("gateway.commands.status.ADMIN", Address("127.0.0.1", 1))  # nobody there, whatever runs here
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SECRET", "it's a long secret")
    Path("routes.yaml").write_text(RULES)
    Path("push.json").write_text('{"repo": "shop"}')
    handlers, level = logging.root.handlers[:], logging.root.level
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a command; return its exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def on_log(work: Callable[[Log], Awaitable[object]], *, owner: bool = False) -> None:
    """Do something with the log of this folder."""

    async def opened() -> None:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=owner)
        try:
            await work(log)
        finally:
            await log.close()

    asyncio.run(opened())


@pytest.fixture
def log() -> None:
    """Have an empty log in the folder."""
    on_log(lambda log: log.create(TOPICS.specs([TOPICS.events("github"), "company.crm"])), owner=True)


def write_event(id: str, *, source: str = "github", topic: str | None = None, **fields: Any) -> None:  # noqa: A002 - a field
    event = an_event(id=id, source=source, **fields)
    on_log(
        lambda log: log.append(
            topic or TOPICS.events(source), key=event_key(event), value=event.body, headers=encode_event(event)
        )
    )


def write_dead_letter(
    event: str,
    *,
    route: str = "build",
    destination: str = "ci",
    reason: str = "exhausted",
    body: bytes = b'{"a":1}',
    part: Part | None = None,
) -> str:
    delivery = replace(
        a_delivery(
            event=an_event(id=event, body=body, headers={"X-One": "1"}),
            route=route,
            destination=destination,
            attempts=(an_attempt(1, status=503, detail="later"), an_attempt(2, status=500)),
        ),
        part=part,
    )
    note = RecordMetadata(dead_reason=reason, detail="500 after 2 attempts")
    on_log(
        lambda log: log.append(
            TOPICS.dead, key=b"ci", value=delivery.event.body, headers=encode_delivery(delivery, note, at=NOW)
        )
    )
    return delivery.id


def stored() -> list[ControlRecord]:
    """Return what is stored in the control topic, oldest first."""
    found: list[ControlRecord] = []

    async def read(log: Log) -> None:
        async for records in log.scan(Partition(TOPICS.control, 0), 0, 1000):
            found.extend(decode(record.key, record.value) for record in records)

    on_log(read)
    return found


def give(command: ControlRecord) -> None:
    key, value = command.encode()
    on_log(lambda log: log.append(TOPICS.control, key=key, value=value, headers=[]))


def carry_out(command: ControlRecord, **changes: Any) -> None:
    """Publish a command's end, as the running gateway does."""
    give(command.with_state("active" if command.kind == "pause" else "done", **changes))


# ---- Calling ----


def test_without_a_command_there_is_help_and_a_failure(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert all(name in out for name in COMMANDS)
    assert run("--help")[0] == 0
    code, out, _ = run("dead")
    assert code == 2
    assert "dead replay" in out
    assert "topics" not in out
    assert run("dead", "--help")[0] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert f"example:\n  gateway {name}" in out


def test_every_command_is_listed() -> None:
    modules = [COMMANDS[name].run.__module__ for name in COMMANDS]
    assert set(modules) == {f"gateway.commands.{path.stem}" for path in Path(commands.__path__[0]).glob("*.py")} - {
        f"gateway.commands.{each}"
        for each in (
            *("__init__", "base", "counting_replays", "grants"),
            *("remote", "replay_by_api", "replaying", "stored_commands", "values"),
        )
    }
    assert set(REGISTERED) == set(COMMANDS)


def test_a_command_imports_only_what_it_needs() -> None:
    """A command on an embedded log starts in half the time that all of the gateway takes."""
    asked = "import sys; from gateway.cli import COMMANDS; COMMANDS['status']; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, check=True, timeout=30, text=True).stdout
    heavy = {"aiohttp", "aiokafka", "gateway.ingress", "gateway.run", "opentelemetry", "prompt_toolkit", "uvloop"}
    assert heavy.isdisjoint(told.split())


def test_an_unknown_command_is_named_with_the_nearest(run: Run) -> None:
    assert run("chek") == (2, "", "error: unknown command 'chek', did you mean 'check'?; `gateway --help` lists them\n")
    assert "unknown command 'dead lst', did you mean 'list'?" in run("dead", "lst")[2]


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version")[1].startswith("gateway ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("dead list --since soon", "--since: expected a duration such as 30s, 5m or 2h, got 'soon'"),
        ("dead list --limit 0", "--limit: expected an integer of at least 1, got '0'"),
        ("explain --source github --header x push.json", "--header: expected 'Name: value', got 'x'"),
        ("explain --source github --query x push.json", "--query: expected NAME=VALUE, got 'x'"),
        ("receive --respond 99", "--respond: expected statuses such as 503,503,200, got '99'"),
        ("receive --port 70000", "--port: expected a port from 0 to 65535, got '70000'"),
        ("receive --secret whsec_", "--secret: expected a secret of the form whsec_ and base64"),
        ("receive --secret whsec_?", "--secret: expected a secret of the form whsec_ and base64"),
        (
            "dead list --log mysql://x",
            "--log: expected sqlite:///path or kafka://host:port[,host:port], got 'mysql://x'",
        ),
        ("run --listen 8080", "--listen: expected host:port, got '8080'"),
        ("send", "the following arguments are required: SOURCE"),
        (
            "replay --route build --from soon",
            "--from: expected a duration such as 2h, or a time with its zone such as ",
        ),
        ("replay --route build --from 2026-11-25", "--from: expected a duration such as 2h, or a time with its zone"),
        ("replay --route build --from 2026-11-25T08:00:00", "--from: expected a duration such as 2h, or a time with"),
        ("replay --route build --from 1h --rate 5", "--rate: expected a rate such as 100/s, 10/m or 5/h, got '5'"),
        ("replay --follow x --cancel y", "--cancel: not allowed with argument --follow"),
        (
            "replay --route build",
            "replay: expected --route and --from, --from and --undelivered for every route, or --event,",
        ),
        (
            "replay --from 1h --source github",
            "replay: expected --route and --from, --from and --undelivered for every ",
        ),
        ("replay --from 1h --undelivered --source githup", "--source: unknown source 'githup', did you mean 'github'?"),
        ("replay --from 1h --undelivered --destination ci --rate 5/s", "--rate needs --route"),
        ("replay --route biuld --from 1h", "--route: unknown route 'biuld', did you mean 'build'?"),
        (
            "replay --route build --from 1h --destination cii",
            "--destination: expected one of route build (ci), got 'cii', did you mean 'ci'?",
        ),
        ("replay --route build --from 1h --source crm", "--source: expected one of route build (github), got 'crm'"),
        ("events show x y", "unrecognized arguments: y"),
        ("migrate --to kafka://a:1", "the following arguments are required: --from"),
        ("migrate --from x --to kafka://a:1", "--from: expected sqlite:///path or kafka://host:port[,host:port], got"),
        ("migrate --from kafka://a:1 --to sqlite:///x.db", "migrate: expected --from sqlite:///FILE and --to kafka://"),
        ("migrate --from sqlite:///none.db --to kafka://a:1", "--from: expected an embedded log, got no file none.db"),
        ("backup --log kafka://a:1 x.db", "--log: expected sqlite:///FILE, got Kafka, which has replicas instead"),
        ("backup --log sqlite:///none.db x.db", "none.db: expected an embedded log, got: no such file or directory"),
    ],
)
def test_bad_usage_is_one_clear_line(run: Run, words: str, told: str) -> None:
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


def test_a_variable_sets_what_no_flag_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_LOG", "redis://x")
    monkeypatch.setenv("GATEWAY_LISTEN", "nowhere")  # which is of no concern to this command
    assert run("dead", "list") == (
        2,
        "",
        "error: GATEWAY_LOG: expected sqlite:///path or kafka://host:port[,host:port], got 'redis://x'\n",
    )
    assert "none.db" in run("dead", "list", "--log", "sqlite:///none.db")[2]


@pytest.mark.usefixtures("log")
def test_a_log_is_copied_beside_its_owner(run: Run) -> None:
    write_event("evt_1")
    code, out, _ = run("backup", "copy.db", "--json")
    assert code == 0
    assert lines(out) == [{"file": "copy.db", "bytes": Path("copy.db").stat().st_size}]
    assert "evt_1" in run("events", "list", "--log", "sqlite:///copy.db")[1]
    code, _, err = run("backup", "gateway.db")  # which is the log
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: gateway.db: expected a file of its own for the copy, got the log's gateway.db")


@pytest.mark.usefixtures("log")
def test_a_backup_is_restored_once_the_log_has_no_owner(run: Run) -> None:
    write_event("evt_1")
    run("backup", "copy.db")
    write_event("evt_2")
    code, out, _ = run("restore", "copy.db", "--json")
    assert code == 0
    [restored] = lines(out)
    before = restored["before"]
    size = Path("copy.db").stat().st_size
    assert restored == {"file": "gateway.db", "bytes": size, "before": before, "stray": None}
    assert "evt_2" not in run("events", "list")[1]
    assert "evt_2" in run("events", "list", "--log", f"sqlite:///{before}")[1]
    assert " MB, its structure checked; the previous log was kept as " in run("restore", "copy.db")[1]
    with closing(Lock(Path("gateway.db"))):
        code, _, err = run("restore", "copy.db")
    assert code == 1
    assert "gateway.db is in use by another gateway (pid " in err


@pytest.mark.parametrize("is_copied_by_hand", [False, True])
@pytest.mark.usefixtures("log")
def test_a_restore_reports_a_wal_without_its_file_and_how_to_see_both(run: Run, *, is_copied_by_hand: bool) -> None:
    write_event("evt_1")
    run("backup", "copy.db")
    asyncio.run(lose_file("evt_2"))
    if is_copied_by_hand:
        shutil.copy("copy.db", "gateway.db")
    wal = Path("gateway.db-wal").read_bytes()
    code, out, err = run("restore", "copy.db")
    assert code == 0
    [stray] = Path().glob("gateway.db.before-*-wal")
    assert stray.read_bytes() == wal
    file = stray.resolve().with_name(stray.name.removesuffix("-wal"))
    assert "Start the gateway" not in out
    told = " ".join(err.split())
    assert f"{file}-wal had no database file, and may have acknowledged events" in told
    assert f"Before you start the gateway, put that file back as {file}," in told
    assert ".instead" in out if is_copied_by_hand else "what was there" not in out
    Path("moved.db").rename(file)
    assert "evt_2" in run("events", "list", "--log", f"sqlite:///{file}")[1]
    assert run("backup", "--log", f"sqlite:///{file}", "whole.db")[0] == 0
    [restored] = lines(run("restore", "whole.db", "--json")[1])
    assert restored["stray"] is None
    assert "evt_2" in run("events", "list")[1]


@pytest.mark.usefixtures("log")
def test_a_wal_without_its_file_is_named_in_json(run: Run) -> None:
    run("backup", "copy.db")
    asyncio.run(lose_file("evt_1"))
    [restored] = lines(run("restore", "copy.db", "--json")[1])
    [stray] = Path.cwd().glob("gateway.db.before-*-wal")
    assert (restored["before"], restored["stray"]) == (None, str(stray))


async def lose_file(event: str) -> None:
    """Move the file away under its owner, once it has acknowledged an event."""
    file = Path("gateway.db")
    log = await EmbeddedLog.open(file, owner=True)
    await log.append(TOPICS.events("github"), key=b"k", value=b"{}", headers=encode_event(an_event(id=event)))
    moved_away(file)
    with pytest.raises(LogLostError):
        await log.ping()
    await log.close()


def moved_away(file: Path) -> None:
    file.rename("moved.db")


# ---- Rules ----


def test_fine_rules_are_counted(run: Run) -> None:
    assert run("check") == (0, "routes.yaml: 2 sources, 1 destination, 2 routes: ok\n", "")
    assert run("check", "--json") == (0, "", "")


def test_an_unresolved_reference_is_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET")
    code, out, _ = run("check", "routes.yaml")
    assert code == 0
    assert out.splitlines()[-1].endswith("ok, with 1 warning")
    assert out.startswith("warning: routes.yaml:4:")


def test_a_topic_of_the_gateways_own_is_a_problem_of_the_rules(run: Run) -> None:
    Path("own.yaml").write_text(
        RULES.replace("sources:\n", "sources:\n  own: {verify: {scheme: none}, topic: gateway.dead}\n", 1)
    )
    code, out, err = run("check", "own.yaml")
    assert code == 2
    assert "routes: ok" not in out
    assert "topic gateway.dead: expected a name for events, got one of the gateway's own topics" in err
    assert run("check", "own.yaml", "--topic-prefix", "hooks.")[0] == 0


def test_every_problem_is_reported_with_its_place(run: Run) -> None:
    Path("bad.yaml").write_text(RULES.replace("to: ci}", "to: cj}").replace("scheme: github", "scheme: gitub"))
    code, out, _ = run("check", "bad.yaml")
    assert code == 2
    assert "error: bad.yaml:4:29: sources.github.verify.scheme: unknown scheme 'gitub'" in out
    assert out.splitlines()[-1] == "bad.yaml: 2 errors"
    code, out, _ = run("check", "bad.yaml", "--json")
    assert code == 2
    problems = lines(out)
    assert [list(problem) for problem in problems] == [
        ["file", "line", "column", "path", "code", "severity", "message"]
    ] * 2
    assert problems[1]["path"] == "routes[0].to"
    assert {problem["severity"] for problem in problems} == {"error"}


def test_check_refuses_a_source_whose_secrets_have_all_ended_and_warns_of_one(run: Run) -> None:
    for text, code, told in (
        ('[{secret: "${SECRET}", until: 2001-01-01}]', 2, "error: expired.yaml:4:"),
        ('["${SECRET}", {secret: "${SECRET}", until: 2001-01-01}]', 0, "warning: expired.yaml:4:"),
    ):
        Path("expired.yaml").write_text(RULES.replace('["${SECRET}"]', text))
        found, out, _ = run("check", "expired.yaml")
        assert (found, out.startswith(told)) == (code, True), out
        explained = run("explain", "expired.yaml", "github")[1] if code else ""
        assert "until" in explained or not code


def test_check_reads_the_ingresss_certificates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority()
    for name, days in (("fine", 90), ("soon", 13), ("over", -1)):
        Path(f"{name}.pem").write_text("".join(authority.issue("hooks.example", life=timedelta(days=days))))
    Path("bad.pem").write_text("nothing")
    monkeypatch.setenv("GATEWAY_TLS_CERTIFICATE", "fine.pem")
    assert run("check")[:2] == (0, "routes.yaml: 2 sources, 1 destination, 2 routes: ok\n")
    code, out, _ = run("check", "--tls-certificate", "fine.pem,soon.pem,over.pem")
    assert code == 0
    told = "warning: --tls-certificate: {}: expected a certificate that is valid for 14 days, got one "
    assert out.splitlines()[0].startswith(told.format("soon.pem") + "until 20")
    assert out.splitlines()[1].startswith(told.format("over.pem") + "that expired 20")
    assert out.endswith("with 2 warnings\n")
    code, out, _ = run("check", "--tls-certificate", "fine.pem,bad.pem", "--tls-key", "bad.pem,none.pem")
    assert code == 2
    assert [line.split(": ")[:3] for line in out.splitlines()[:2]] == [
        ["error", "--tls-key", "bad.pem"],
        ["error", "--tls-certificate", "bad.pem"],
    ]
    [problem, _] = lines(run("check", "--json", "--tls-certificate", "bad.pem,none.pem")[1])
    assert (problem["path"], problem["code"], problem["severity"]) == ("--tls-certificate", "certificate", "error")


def test_check_warns_of_a_certificate_that_no_client_can_present(run: Run) -> None:
    authority = Authority()
    Path("ca.pem").write_text(authority.pem)
    Path("tls.pem").write_text("".join(authority.issue("hooks.example", life=timedelta(days=90))))
    demand = "sources:\n  bank: {verify: {scheme: none}, client_certificate: {ca: '${file:ca.pem}'}}\n"
    rules = RULES.replace("sources:\n", demand, 1)
    Path("bank.yaml").write_text(rules)
    told = (
        "warning: sources.bank.client_certificate: expected TLS to be terminated here (--tls-certificate) or at a proxy"
    )
    assert told in run("check", "bank.yaml")[1]
    assert told not in run("check", "bank.yaml", "--tls-certificate", "tls.pem")[1]
    header = "ingress: {trusted_proxies: [10.0.0.1], certificate_header: {name: Client-Cert, format: pem}}\n"
    Path("bank.yaml").write_text(rules + header)
    assert told not in run("check", "bank.yaml")[1]


def test_missing_rules_are_reported(run: Run) -> None:
    for words in (["check", "none.yaml"], ["run", "--rules", "none.yaml"]):
        code, out, err = run(*words)
        assert code == 2
        assert "none.yaml: expected a file" in out + err


def test_check_takes_its_rule_file_as_a_flag_too_but_only_one(run: Run) -> None:
    Path("other.yaml").write_text(Path("routes.yaml").read_text() + "nonsense: 1\n")
    code, out, _ = run("check", "--rules", "other.yaml")
    assert code == 2
    assert "other.yaml:" in out
    code, _, err = run("check", "other.yaml", "--rules", "routes.yaml")
    assert (code, err) == (2, "error: --rules: expected one rule file, got 'other.yaml' as well\n")


def test_the_schema_is_json(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["title"] == "routes.yaml"
    assert run("schema", "--json")[1].count("\n") == 1


EXPLAIN = ("--source", "github", "--header", "X-GitHub-Event: push", "--header", "X-GitHub-Delivery: 1")


@pytest.mark.parametrize(
    "words",
    [
        ("routes.yaml", *EXPLAIN, "push.json"),
        (*EXPLAIN, "routes.yaml", "push.json"),
        ("routes.yaml", "push.json", *EXPLAIN),
        (*EXPLAIN, "push.json"),
        ("--rules", "routes.yaml", *EXPLAIN, "push.json"),
    ],
)
def test_explain_shows_the_fate_of_an_event(run: Run, words: tuple[str, ...]) -> None:
    code, out, _ = run("explain", "--json", *words)
    assert code == 0
    told = json.loads(out)
    event = told["event"]
    assert event == {"id": event["id"], "source": "github", "type": "push", "key": "shop"}
    build, customers = told["routes"]
    (request,) = build.pop("requests")
    assert build == {"name": "build", "matched": True, "reason": "matched", "owner": None, "runbook": None}
    assert list(request) == ["destination", "method", "url", "headers", "not_forwarded", "body"]
    assert request["not_forwarded"] == []
    assert (request["destination"], request["method"], request["body"]) == ("ci", "POST", '{"repo": "shop"}')
    assert request["url"] == "http://127.0.0.1:1/hook?***"
    assert request["headers"]["gateway-route"] == "build"
    assert customers == {
        "name": "customers",
        "matched": False,
        "reason": "from: expected crm, got github",
        "owner": None,
        "runbook": None,
        "requests": [],
    }


def test_explain_shows_people_the_requests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"name": "J\xc3\xb6rg"}')

    monkeypatch.setattr(sys, "stdin", Stdin)
    headers = [argument for name in ("X-A", "x-a", "X-Real-IP") for argument in ("--header", f"{name}: b")]
    code, out, _ = run("explain", "--source", "crm", "--show-secrets", *headers, "-")
    assert code == 0
    assert "      not forwarded of the sender's headers: X-A, x-a, X-Real-IP\n" in out
    told = run("explain", "--source", "github", "--header", "X-GitHub-Event: push", *headers, "push.json")[1]
    assert "      not forwarded of the sender's headers: X-Real-IP\n" in told
    assert "✓ customers  matched" in out
    assert "✗ build  from: expected github, got crm" in out
    assert "ci: POST http://127.0.0.1:1/hook?token=abc" in out
    assert "      Jörg\n" in out
    assert "no route matches" in run("explain", "--source", "github", "push.json")[1]


@pytest.mark.parametrize(
    ("order", "end"),
    [
        ("", "dead-lettered as expression_error:"),
        (", order: key, on_exhausted: halt", "halts its key (expression_error):"),
    ],
)
def test_explain_says_how_a_request_that_fails_ends(run: Run, order: str, end: str) -> None:
    rules = RULES.replace("to: ci}", "to: ci, request: {body: '${{ body.who }}'}" + order + "}", 1)
    Path("failing.yaml").write_text(rules)
    code, out, _ = run("explain", "failing.yaml", *EXPLAIN, "push.json")
    assert code == 0, out
    assert f"ci: {end} request.body: body.who isn't there" in out


def test_explain_says_once_how_a_condition_failed(run: Run) -> None:
    Path("failing.yaml").write_text(RULES.replace("match: {type: push}", 'when: "body.repo < 3"'))
    code, out, _ = run("explain", "failing.yaml", *EXPLAIN, "push.json")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "body.repo < 3" in line]
    assert line.startswith("✓ build  when: failed: body.repo < 3: ")
    assert "    ci: dead-lettered as expression_error\n" in out
    (request,) = json.loads(run("explain", "failing.yaml", "--json", *EXPLAIN, "push.json")[1])["routes"][0]["requests"]
    assert (request["destination"], request["reason"]) == ("ci", "expression_error")
    assert request["error"].startswith("when: failed: body.repo < 3: ")


def test_explain_says_why_a_route_that_splits_makes_no_request(run: Run) -> None:
    Path("split.yaml").write_text(RULES.replace("to: ci}", "to: ci, split: body.rows}", 1))
    Path("rows.json").write_text('{"repo": "shop", "rows": []}')
    out = run("explain", "split.yaml", *EXPLAIN, "rows.json")[1]
    assert "✓ build  matched\n    no requests: the list that it splits has no items\n" in out


@pytest.mark.usefixtures("log")
def test_explain_takes_an_item_of_a_request_with_several_events(run: Run) -> None:
    Path("routes.yaml").write_text(RULES.replace("key: body.repo}", "split: body.items}"))
    Path("several.json").write_text('{"items": [{"repo": "shop"}, {}]}')
    code, out, err = run("explain", *EXPLAIN, "several.json")
    told = "error: the ingress makes 2 events of this body (split): pass one of its items as the event\n"
    assert (code, out, err) == (2, "", told)
    assert run("explain", *EXPLAIN, "push.json")[0] == 0
    name = event_id("github", "1")
    write_event(name, type="push", headers={"X-GitHub-Delivery": "1"}, body=b'{"items": [1]}')
    code, out, _ = run("explain", name)
    assert (code, "✓ build  matched" in out) == (0, True), "stored before its source split anything"


def test_explain_needs_its_files(run: Run) -> None:
    code, _, err = run("explain", "--source", "github", "none.json")
    assert (code, err) == (2, "error: none.json: expected a file, got: no such file or directory\n")
    assert run("explain", "none.yaml", "--source", "github", "push.json")[0] == 2
    assert "unknown source 'gitub', did you mean" in run("explain", "--source", "gitub", "push.json")[2]


@pytest.mark.usefixtures("log")
def test_explain_takes_an_event_of_the_log(run: Run) -> None:
    name = event_id("github", "1")
    write_event(name, type="push", headers={"X-GitHub-Delivery": "1"}, body=b'{"repo": "shop"}')
    code, out, _ = run("explain", name)
    assert code == 0
    assert f"event {name}  source github  type push" in out
    assert "✓ build  matched" in out
    assert "dead letter" not in out
    assert "dead_letters" not in lines(run("explain", name, "--json")[1])[0]
    write_dead_letter(event_id("github", "3"))
    delivery = write_dead_letter(name)
    out = run("explain", name)[1]
    assert f"an open dead letter: build → ci  exhausted, 500\n  gateway dead show {delivery}\n" in out
    assert lines(run("explain", name, "--json")[1])[0]["dead_letters"] == [
        {
            "delivery_id": delivery,
            "route": "build",
            "destination": "ci",
            "reason": "exhausted",
            "last_result": "500",
        }
    ]
    run("dead", "drop", delivery, "--yes", "--no-wait")
    carry_out(stored()[-1], count=1)
    assert "dead letter" not in run("explain", name)[1]
    assert run("explain", event_id("github", "2"))[0] == 1
    assert "expected --source with a file, an event's id, or the name of a source" in run("explain", "push.json")[2]


@pytest.mark.parametrize("guide", provider_guides(), ids=lambda guide: guide.name)
def test_the_rules_that_are_shown_for_a_provider_are_valid(tmp_path: Path, guide: ProviderGuide) -> None:
    rules = tmp_path / "routes.yaml"
    rules.write_text(f"version: 1\n{guide.snippet}\n")
    found = check_rules(rules, environ={})[1]
    assert [str(problem) for problem in found if problem.severity == "error"] == []


def test_providers_lists_them_and_shows_how_to_connect_one(run: Run) -> None:
    code, out, _ = run("providers", "--json")
    listed = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [each["name"] for each in listed] == sorted(PRESETS)

    code, out, _ = run("providers", "square")
    assert code == 0
    assert "HMAC-SHA256 in base64 of `{url}{body}`, in the header `x-square-hmacsha256-signature`" in out
    snippet = "version: 1\n" + out[out.index("sources:") :]
    Path("square.yaml").write_text(snippet)
    assert run("check", "square.yaml")[0] == 0

    code, _, err = run("providers", "sqare")
    assert code == 2
    assert "expected a provider's name, got 'sqare', did you mean 'square'?" in err


OWN_PROVIDERS = """
version: 1
providers:
  acme.shop:
    title: Acme
    docs: [https://acme.example/hooks, https://acme.example/sdk]
    secret: what Acme shows once
    setup: Create a webhook.
    verify: {header: X-Acme}
  1forge: {like: stripe}
  signed: {verify: {scheme: http-message-signature, algorithm: ed25519}}
  tokens: {verify: {scheme: jwt, algorithms: EdDSA}}
  plain: {verify: {scheme: hash, header: X-S, signed: "{body}{secret}"}}
  listed: {verify: [{scheme: basic, username: us}, {scheme: token, query: t}]}
  keyed: {verify: {scheme: public-key, algorithm: ed25519, field: s}, asks: {account: its id}}
  later: {verify: {header: X-Later}, handshake: notion}
  open: {verify: {scheme: none}}
"""


def test_providers_lists_those_of_the_rules_and_shows_how_to_connect_one(run: Run) -> None:
    Path("own.yaml").write_text(f"{OWN_PROVIDERS}include: more.yaml\nsources: {{a: {{verify: {{scheme: nobodys}}}}}}\n")
    Path("more.yaml").write_text("providers: {more: {verify: {scheme: bearer}}}\n")
    code, out, err = run("providers", "--rules", "own.yaml", "--json")
    listed = {each["name"]: each for each in map(json.loads, out.splitlines())}
    own = [name for name, each in listed.items() if each["is_own"]]
    assert (code, err) == (0, "")
    assert own == sorted([*yaml.safe_load(OWN_PROVIDERS)["providers"], "more"])
    assert listed.keys() == {*own, *PRESETS}
    for name in own:
        code, out, _ = run("providers", name, "--rules", "own.yaml")
        assert code == 0
        Path("copied.yaml").write_text(OWN_PROVIDERS + "include: more.yaml\n" + out[out.index("sources:") :])
        assert run("check", "copied.yaml")[0] == 0, name
    _, out, _ = run("providers", "acme.shop", "--rules", "own.yaml")
    for text in ("Acme", "https://acme.example/sdk", "secret what Acme shows once", "set up Create a webhook."):
        assert text in out
    assert "of own.yaml" in run("providers", "--rules", "own.yaml")[1]


def test_providers_needs_no_rules_for_what_it_knows_itself(run: Run) -> None:
    assert run("providers", "stripe", "--rules", "missing.yaml")[0] == 0
    code, _, err = run("providers", "--rules", "missing.yaml")
    assert code == 2
    assert "missing.yaml: expected a rule file, got none" in err
    Path("routes.yaml").unlink()
    assert run("providers")[0] == 0


def test_a_provider_with_a_problem_is_told_of_beside_the_others(run: Run) -> None:
    Path("own.yaml").write_text("version: 1\nproviders: {bad: {verify: {scheme: token}}, good: {like: github}}\n")
    code, out, err = run("providers", "--rules", "own.yaml", "--json")
    assert code == 0
    assert [each["name"] for each in map(json.loads, out.splitlines()) if each["is_own"]] == ["good"]
    assert "own.yaml:2:27: providers.bad.verify: expected one of header, query, field, got none; so a provider" in err


def test_explain_shows_how_a_source_identifies_events(run: Run) -> None:
    code, out, _ = run("explain", "github")
    assert code == 0
    first, verify, way, secrets, identity, *others = out.splitlines()
    assert first == "source github  path /in/github"
    assert (verify, way) == (
        "verify github  routes.yaml:4",
        "  sha256 signature in the header X-Hub-Signature-256",
    )
    assert secrets == "  1 secret: ${SECRET}"
    assert identity == (
        "identity headers['x-github-delivery'], else the header Idempotency-Key; "
        "dedupe is off: duplicates are delivered"
    )
    assert others == ["type headers['x-github-event'], else the word webhook", "key body.repo", "routes build"]
    Path("routes.yaml").write_text(RULES.replace("topic: company.crm", "id: body.n, dedupe: 1h"))
    code, out, _ = run("explain", "crm", "--json")
    (told,) = lines(out)
    verify = told.pop("verify")
    assert (verify["scheme"], verify["secrets"], verify["signing_methods"][0]["header"]) == (
        "token",
        ["***"],
        "X-Token",
    )
    assert (code, [told]) == (
        0,
        [
            {
                "source": "crm",
                "path": "/in/crm",
                "identity": {"from": ["body.n", "the header Idempotency-Key"], "dedupe_seconds": 3600.0},
                "type": [],
                "key": [],
                "routes": ["customers"],
            }
        ],
    )
    code, _, err = run("explain", "githb")
    assert (code, err.endswith("or the name of a source, did you mean 'github'?\n")) == (2, True)


@pytest.mark.usefixtures("log")
def test_check_warns_of_logged_identities_that_are_all_equal(run: Run) -> None:
    deduped = RULES.replace("key: body.repo}", "key: body.repo, dedupe: 1h}")
    Path("routes.yaml").write_text(deduped.replace("topic: company.crm", "topic: company.crm, id: body.same"))
    for number in range(12):
        write_event(event_id("github", str(number % 9)), headers={"X-GitHub-Delivery": str(number % 9)})
        write_event(event_id("crm", "1"), source="crm", topic="company.crm", body={"same": 1})
    code, out, _ = run("check", "--since", "1h")
    assert code == 0
    one, other = [line for line in out.splitlines() if line.startswith("warning: sources.")]
    assert one == (
        "warning: sources.crm.id: expected an identity that differs from event to event, got one for 12 events; "
        "`gateway explain crm` shows what identifies its events"
    )
    assert "sources.github.id: expected events that differ, got 3 of 12 that are taken for duplicates" in other
    assert [row.split() for row in out.splitlines() if row.startswith(("crm ", "github "))] == [
        ["crm", "push", "12", "11", "0", "0"],
        ["github", "push", "12", "3", "0", "0"],
    ]
    code, out, _ = run("check", "--since", "1h", "--json")
    assert [(told["path"], told["code"]) for told in lines(out)[-2:]] == [
        ("sources.crm.id", "identity"),
        ("sources.github.id", "identity"),
    ]
    Path("routes.yaml").write_text(RULES)
    assert "sources.github" not in run("check", "--since", "1h")[1], "what comes again is meant to be delivered again"
    assert "sources." not in run("check")[1]


@pytest.mark.usefixtures("log")
def test_check_fails_where_an_identity_makes_different_events_equal_and_tries_another(run: Run) -> None:
    rules = RULES.replace("topic: company.crm", "topic: company.crm, id: body.customer, dedupe: 1h")
    Path("routes.yaml").write_text(rules)
    for number in range(12):
        body = {"customer": number % 4, "number": number // 4 + 10 * (number % 4)} if number % 2 else {"customer": 0}
        name = event_id("crm", str(body["customer"]))
        write_event(name, source="crm", topic="company.crm", type="order" if number % 2 else "ping", body=body)
    code, out, _ = run("check", "--since", "1h")
    assert code == 1
    table = [row.split() for row in out.splitlines() if row.startswith("crm ")]
    assert table == [["crm", "order", "6", "0", "4", "0"], ["crm", "ping", "6", "5", "0", "0"]]
    (told,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "sources.crm.id: expected an identity for each event, got 2 identities for 6 different events, such " in told
    assert out.splitlines()[-1].endswith("the identities of 1 source are the same for different events, with 1 warning")
    (one, other) = re.findall(r"company\.crm/\d@\d+", told)
    assert one != other
    code, out, _ = run("check", "--since", "1h", "--json")
    counts, error, warning = lines(out)[:2], lines(out)[2], lines(out)[3]
    assert code == 1
    expected = {"events": 6, "copies": 0, "conflicts": 4, "without_identity": 0}
    assert counts[0] == {"source": "crm", "type": "order"} | expected
    assert (error["path"], error["severity"], warning["severity"]) == ("sources.crm.id", "error", "warning")
    Path("tried.yaml").write_text(rules.replace("id: body.customer", "id: body.number"))
    code, out, _ = run("check", "tried.yaml", "--since", "1h")
    assert (code, "routes: ok" in out) == (0, True), "without an identity there is no duplicate"
    (told,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "sources.crm.id: expected an identity in each event, got none in 6 of 12, such as company.crm/" in told
    assert ": `id: body.number` gives nothing; " in told
    table = [row.split() for row in out.splitlines() if row.startswith("crm ")]
    assert table == [["crm", "order", "6", "0", "0", "0"], ["crm", "ping", "6", "0", "0", "6"]]


@pytest.mark.usefixtures("log")
def test_check_names_duplicates_delivered_as_their_identity_has_many_contents(run: Run) -> None:
    rules = RULES.replace("topic: company.crm", "topic: company.crm, id: body.same, dedupe: 1h")
    beyond = f"dedupe remembers {ENTRIES_KEPT} contents of an identity, and delivers duplicates of others"
    for number in range(ENTRIES_KEPT + 1):
        is_beyond = number == ENTRIES_KEPT
        for _ in range(2):
            body = {"same": 1, "number": number}
            write_event(event_id("crm", "1"), source="crm", topic="company.crm", body=body)
        Path("routes.yaml").write_text(rules)
        assert (beyond in run("check", "--since", "1h")[1]) is is_beyond
    Path("routes.yaml").write_text(rules.replace(", dedupe: 1h", ""))
    assert beyond not in run("check", "--since", "1h")[1]


@pytest.mark.usefixtures("log")
def test_check_fails_where_an_id_is_in_no_event_or_is_refused_in_all(run: Run) -> None:
    for number in range(3):
        headers = {"Idempotency-Key": str(number)}  # which identifies them, but isn't what the source names
        write_event(event_id("crm", str(number)), source="crm", topic="company.crm", headers=headers, body={"a": {}})
        write_event(event_id("github", str(number)), headers={"X-GitHub-Delivery": str(number)})
    assert "warning" not in run("check", "--since", "1h")[1]
    why = {
        "headers['x-nope']": "`id: headers['x-nope']` gives nothing",
        "body.b.c": "`id: body.b.c` gives nothing",
        "body.a": "the ingress would refuse it, 400: id: body.a: expected a string or number, got a mapping",
    }
    for tried, told in why.items():
        rules = RULES.replace("topic: company.crm", f'topic: company.crm, id: "{tried}"')
        Path("tried.yaml").write_text(rules)
        code, out, _ = run("check", "tried.yaml", "--since", "1h")
        assert (code, "routes: ok" in out) == (1, False)
        (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
        assert "sources.crm.id: expected an identity in each event, got none in 3 of 3, such as company.crm/" in line
        assert f": {told}; " in line
        assert out.splitlines()[-1].endswith("the `id` of 1 source is in none of the events")
        code, out, _ = run("check", "tried.yaml", "--since", "1h", "--json")
        crm, github, error = lines(out)
        assert (crm["without_identity"], github["without_identity"], error["severity"]) == (3, 0, "error")
    rules = RULES.replace("topic: company.crm", "topic: company.crm, id: \"headers['idempotency-key']\"")
    Path("tried.yaml").write_text(rules)
    assert run("check", "tried.yaml", "--since", "1h")[0] == 0


@pytest.mark.usefixtures("log")
def test_a_strict_check_names_a_field_that_no_recent_event_had(run: Run) -> None:
    for number in range(12):
        write_event(event_id("github", str(number)), headers={"X-GitHub-Delivery": str(number)}, body={"ref": "main"})
    Path("tried.yaml").write_text(f"{RULES}  - {{name: mistyped, from: github, match: {{body.reff: main}}, to: ci}}\n")
    number = len(RULES.splitlines()) + 1
    told = (
        f"warning: tried.yaml:{number}:44: routes[2].match.body.reff: expected body.reff in an event, got 12 events "
        "that fit otherwise, all without it [unseen]\n"
    )
    code, out, _ = run("check", "tried.yaml", "--since", "1h", "--strict")
    assert code == 1
    assert told in out
    assert "[unseen]" not in run("check", "tried.yaml", "--since", "1h")[1]
    rules = Path("tried.yaml").read_text().replace("to: ci}\n", "to: ci}  # allow unseen: they begin in March\n")
    Path("tried.yaml").write_text(rules)
    assert "[unseen]" not in run("check", "tried.yaml", "--since", "1h", "--strict")[1]


@pytest.mark.usefixtures("log")
def test_a_test_takes_its_event_from_the_log_by_its_id(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    event, unknown = event_id("github", "1"), event_id("github", "2")
    write_event(event, headers={"X-GitHub-Event": "push"}, type="push", body={"repo": "shop"})
    text = f"tests:\n  - name: t\n    event: {{captured: {event}}}\n    expect: {{routes: [build]}}\n"
    Path("tests").mkdir()
    (file := Path("tests/stored.yaml")).write_text(text)
    assert run("test", "--log", "sqlite:///gateway.db")[0] == 0
    code, _, said = run("test", "--log", "sqlite:///gateway.db", "--only", "t")
    assert (code, said) == (0, "")
    code, out, _ = run("test")
    assert code == 2
    assert (
        f"error: {file}:2:5: tests.t.event.captured: expected a file at tests/{event}, got no such file, and no log to "
        "look for an event with this id: --log or GATEWAY_LOG names one\n"
    ) in out
    file.write_text(text.replace(event, unknown))
    monkeypatch.setenv("GATEWAY_LOG", "sqlite:///gateway.db")
    code, out, _ = run("test")
    assert code == 2
    assert f"expected a file at tests/{unknown}, got no such file, and no event with this id in the log\n" in out


def test_tests_in_a_rule_file_of_any_name_are_tried(run: Run) -> None:
    test = "{name: %s, event: {source: crm, body: {name: A}}, expect: {routes: %s}}"
    Path("rules").write_text(RULES + "include: [more]\ntests: [" + test % ("a", "[customers]") + "]\n")
    Path("more").write_text("tests: [" + test % ("b", "[]") + "]\n")
    code, out, _ = run("test", "rules")
    assert code == 1
    assert "failed: more:1:9: b" in out
    assert "rules: 2 tests: 1 failed" in out
    assert f"rules:{4}" in run("explain", "rules", "github")[1]


def test_explain_shows_an_events_identity_and_whether_it_is_deduplicated(run: Run) -> None:
    told = json.loads(run("explain", "--json", *EXPLAIN, "push.json")[1])
    assert told["identity"] == {"from": "headers['x-github-delivery']", "dedupe_seconds": None}
    assert "identity headers['x-github-delivery']; dedupe is off" in run("explain", *EXPLAIN, "push.json")[1]
    rules = Path("routes.yaml").read_text()
    Path("routes.yaml").write_text(rules.replace("key: body.repo", "key: body.repo, id: body.repo, dedupe: 90m"))
    assert (
        "identity body.repo; dedupe 90m: the same identity with the same content"
        in run("explain", *EXPLAIN, "push.json")[1]
    )
    Path("routes.yaml").write_text(rules.replace("key: body.repo", "key: body.repo, id: body.none"))
    assert "identity none: each request counts as a new event" in run("explain", "--source", "github", "push.json")[1]


def test_explain_shows_what_rules_read_of_a_body_that_is_no_plain_json(run: Run) -> None:
    Path("form").write_bytes(gzip.compress(b"tag=a&tag=b&payload=%7B%22n%22%3A1%7D"))
    form = ("--header", "Content-Type: application/x-www-form-urlencoded", "--header", "Content-Encoding: gzip", "form")
    value = {"tag": ["a", "b"], "payload": {"n": 1}}
    assert json.loads(run("explain", "--json", *EXPLAIN, *form)[1])["body_as_read"] == value
    assert 'body as rules read it\n  {\n    "tag": [\n      "a",' in run("explain", *EXPLAIN, *form)[1]
    Path("form").write_bytes(gzip.compress(b"&".join([b"a=1"] * 99)))
    assert "\n  … and 63 more lines\n" in run("explain", *EXPLAIN, *form)[1]
    assert "as_read" not in run("explain", "--json", *EXPLAIN, "push.json")[1]
    Path("form").write_bytes(b"a=1")
    code, _, err = run("explain", *EXPLAIN, *form)  # whose key is in the body
    why = "expected a whole body in gzip, got another, or only part of it"
    assert (code, f"the ingress would answer 400 (malformed_content): key: {why}" in err) == (1, True)
    Path("routes.yaml").write_text(Path("routes.yaml").read_text().replace("key: body.repo", "key: type"))
    told = json.loads(run("explain", "--json", *EXPLAIN, *form)[1])
    assert (told["body_warnings"], told.get("body_as_read")) == ([f"rules can't read the body: {why}"], None)
    assert why in run("explain", *EXPLAIN, *form)[1]


# ---- Sending and receiving ----


class Gate(BaseHTTPRequestHandler):
    """Answers as the ingress does: a push is taken, the rest refused."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        is_taken = self.headers["X-GitHub-Event"] == "push"
        body = b'{"id":"evt_1"}' if is_taken else b'{"detail":"expected a signature"}'
        self.send_response(202 if is_taken else 401)
        if is_taken:
            self.send_header("gateway-event-id", "evt_1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gate() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Gate)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_send_prints_the_response(run: Run, gate: str) -> None:
    code, out, _ = run("send", "github", "--url", gate, "--type", "push", "push.json")
    assert code == 0
    assert out.startswith("202  evt_1  ")
    code, out, _ = run("send", "github", "push.json", "--url", gate)
    assert code == 1
    assert out.startswith("401  expected a signature  ")


def test_send_prints_each_response_for_scripts(run: Run, gate: str) -> None:
    code, out, _ = run("send", "github", "--url", gate, "--type", "push", "--count", "3", "--json")
    assert code == 0
    answers = lines(out)
    assert [(answer["status"], answer["event_id"]) for answer in answers] == [(202, "evt_1")] * 3
    assert len({answer["id"] for answer in answers}) == 3


def test_send_prints_many_responses_in_a_table(run: Run, gate: str) -> None:
    out = run("send", "github", "--url", gate, "--type", "push", "--count", "5")[1]
    assert "p99 ms" in out
    assert out.splitlines()[-1].split()[:2] == ["202", "5"]


def test_send_needs_somebody_to_answer(run: Run) -> None:
    (port,) = free_ports(1)
    code, out, err = run("send", "github", "--url", f"http://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: http://127.0.0.1:{port}: expected a response, got ")


def test_an_unknown_host_and_a_taken_port_differ() -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert str(cannot_listen("--listen", Address("nosuch.invalid", 80), unknown)) == (
        "--listen nosuch.invalid:80: expected a host that has an address, got name or service not known"
    )
    taken = OSError(errno.EADDRINUSE, "error while attempting to bind on address ('::1', 80, 0, 0)")
    assert str(cannot_listen("--listen", Address("::1", 80), taken)) == (
        "--listen [::1]:80: expected an address that is free, got address already in use"
    )


def test_receive_needs_a_port_that_is_free(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("receive", "--port", str(port))
    assert (code, out) == (1, "")
    assert err.startswith(
        f"error: --host, --port: 127.0.0.1:{port}: expected an address that is free, got address already in use"
    )


# ---- The log ----


@pytest.mark.usefixtures("log")
def test_events_are_listed_newest_first(run: Run) -> None:
    write_event("evt_1", key="shop", body=b"12345")
    write_event("evt_2", source="crm", topic="company.crm")
    write_event("evt_3")
    assert [event["id"] for event in lines(run("events", "list", "--json")[1])] == ["evt_3", "evt_2", "evt_1"]
    assert [event["id"] for event in lines(run("events", "list", "--json", "--limit", "1")[1])] == ["evt_3"]
    (event,) = lines(run("events", "list", "--source", "crm", "--json")[1])
    assert (event["id"], event["topic"], event["offset"]) == ("evt_2", "company.crm", 0)
    out = run("events", "list", "--since", "1h")[1]
    assert all(word in out for word in ("evt_1", "evt_2", "evt_3", "shop", "push"))


@pytest.mark.usefixtures("log")
def test_an_empty_event_list_says_so(run: Run) -> None:
    assert run("events", "list") == (0, "no events\n", "")
    assert run("events", "list", "--json") == (0, "", "")
    assert run("events", "list", "--source", "gitub")[0] == 2


@pytest.mark.usefixtures("log")
def test_a_record_that_is_no_event_is_listed_as_that(run: Run) -> None:
    on_log(lambda log: log.append(TOPICS.events("github"), key=b"", value=b"x", headers=[("gw_v", b"9")]))
    assert "can't be read: gw_v: expected format 1 or older, got 9" in run("events", "list")[1]
    assert "newer version" in lines(run("events", "list", "--json")[1])[0]["problem"]


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("words", [("explain",), ("events", "show"), ("replay", "--event")])
def test_a_place_whose_record_cannot_be_read_is_called_that(run: Run, words: tuple[str, ...]) -> None:
    on_log(lambda log: log.append(TOPICS.events("github"), key=b"", value=b"x", headers=[("gw_v", b"9")]))
    place = next(f"{TOPICS.events('github')}/{number}@0" for number in range(6) if _holds(number))
    code, out, err = run(*words, place)
    told = f"error: {place}: expected an event there, got a record that can't be read: gw_v: expected format 1 or older"
    assert (code, out) == (1, "")
    assert err.startswith(told)
    assert "got neither" in run(*words, f"{place}9")[2]


def _holds(number: int) -> bool:
    """Return whether a partition of the source's topic has a record."""
    found: list[int] = []

    async def look(log: Log) -> None:
        start, end = (await log.bounds(TOPICS.events("github"))).get(number, (0, 0))
        found.append(end - start)

    on_log(look)
    return found[0] > 0


@pytest.mark.usefixtures("log")
def test_a_duplicate_is_shown_with_its_delivered_original(run: Run) -> None:
    rules = Path("routes.yaml").read_text()
    Path("routes.yaml").write_text(rules.replace("key: body.repo", "key: body.repo, dedupe: 1h"))
    name = event_id("github", "1")
    for body in (b"one", b"two", b"one"):
        write_event(name, body=body)
    newest, other, first = lines(run("events", "show", name, "--all", "--json")[1])
    assert newest["duplicate_of"] == f"gateway.events.github/{first['partition']}@{first['offset']}"
    assert "duplicate_of" not in other
    assert "duplicate_of" not in first
    assert "a duplicate of gateway.events.github/" in run("events", "show", name)[1]
    place = f"gateway.events.github/{other['partition']}@{other['offset']}"
    assert [each["offset"] for each in lines(run("events", "show", place, "--json")[1])] == [other["offset"]]
    assert run("events", "show", "gateway.events.github/0@99")[0] == 1


@pytest.mark.usefixtures("log")
def test_explain_says_that_a_duplicate_was_dropped_and_the_remedy(run: Run) -> None:
    rules = Path("routes.yaml").read_text()
    Path("routes.yaml").write_text(rules.replace("key: body.repo", "dedupe: 1h"))
    name, place = event_id("github", "1"), "gateway.events.github/0@"
    for body in (b'{"n": 1}', b'{"n": 2}', b'{"n": 1}'):
        write_event(name, body=body, headers={"X-GitHub-Delivery": "1"})
    code, out, _ = run("explain", name)
    assert code == 0
    assert f"a duplicate of {place}0, within its source's dedupe window: acknowledged, and delivered by no route" in out
    command = out.splitlines()[-1]
    assert command == f"  gateway replay --event {place}2"
    assert run(*command.split()[1:], "--dry-run")[0] == 0
    assert lines(run("explain", name, "--json")[1])[0]["duplicate_of"] == f"{place}0"
    for number in (0, 1):
        out = run("explain", f"{place}{number}")[1]
        assert f"event {name}  source github" in out
        assert ("copy" in out, "gateway replay" in out, "✓ build" in out) == (False, False, True)
    assert run("explain", f"{place}9")[0] == 1


@pytest.mark.usefixtures("log")
def test_an_event_is_shown_with_headers_and_body(run: Run) -> None:
    write_event("evt_1", headers={"X-One": "1"}, query="a=b", body=b'{"n":1}')
    write_event("evt_2", body=b"\xff\x00")
    code, out, _ = run("events", "show", "evt_1")
    assert code == 0
    assert all(word in out for word in ("evt_1", "X-One: 1", "a=b", '{"n":1}', "gateway.events.github/0@0"))
    assert "00000000  ff00" in run("events", "show", "evt_2")[1]
    (event,) = lines(run("events", "show", "evt_2", "--json")[1])
    assert event["body_base64"] == "/wA="
    code, _, err = run("events", "show", "evt_3")
    assert (code, err) == (1, "error: evt_3: expected the id of an event in the log, or its position, got neither\n")


@pytest.mark.usefixtures("log")
def test_an_event_that_is_hidden_in_part_is_shown_with_the_headers_of_what_is_left(run: Run) -> None:
    Path("routes.yaml").write_text(RULES.replace("github: {", "github: {redact: [body.card], "))
    body = b"card=4242424242424242&n=1"
    write_event("evt_1", headers={"Content-Type": "application/x-www-form-urlencoded"}, body=body)
    (event,) = lines(run("events", "show", "evt_1", "--json")[1])
    assert (event["headers"], event["size"]) == ([["Content-Type", "application/json"]], len(body))
    assert json.loads(event["body"]) == {"card": "[redacted]", "n": "1"}
    assert "Content-Type: application/json" in run("events", "show", "evt_1")[1]


def test_a_missing_log_is_reported(run: Run) -> None:
    code, out, err = run("dead", "list")
    assert (code, out) == (2, "")
    assert err.startswith("error: gateway.db: expected an embedded log, got: no such file or directory\n")


def test_an_absent_kafka_is_reported(run: Run) -> None:
    (port,) = free_ports(1)
    code, out, err = run("dead", "list", "--log", f"kafka://127.0.0.1:{port}")
    assert (code, out) == (1, "")
    assert err == f"error: kafka://127.0.0.1:{port}: 127.0.0.1:{port}: expected a broker, got: connection refused\n"
    assert err.count("\n") == 1


def test_topics_are_created_and_checked(run: Run) -> None:
    assert run("topics", "check")[0] == 2  # no log yet
    code, out, _ = run("topics", "create", "--json")
    assert code == 0
    created = {topic["topic"]: topic for topic in lines(out)}
    assert created["company.crm"] == {
        "topic": "company.crm",
        "partitions": 6,
        "retention_seconds": 604800.0,
        "compacted": False,
        "created": True,
    }
    assert created["gateway.control"]["compacted"]
    assert not any(topic["created"] for topic in lines(run("topics", "create", "--json")[1]))
    code, out, _ = run("topics", "check")
    assert code == 0
    assert " ok\n" in out
    Path("routes.yaml").write_text(RULES.replace("company.crm", "company.other"))
    code, out, _ = run("topics", "check")
    assert code == 1
    assert "expected a topic, got none" in out
    (missing,) = [topic for topic in lines(run("topics", "check", "--json")[1]) if not topic["ok"]]
    assert missing["topic"] == "company.other"
    assert missing["problems"] == [{"message": "expected a topic, got none", "fatal": True}]


# ---- Dead letters ----


@pytest.mark.usefixtures("log")
def test_dead_letters_are_listed_until_resolved(run: Run) -> None:
    first = write_dead_letter("evt_1")
    second = write_dead_letter("evt_2", route="other", reason="gone")
    on_log(lambda log: log.append(TOPICS.dead, key=b"k", value=b"x", headers=[("gw_undecodable", b"gw_v: got 9")]))
    out = run("dead", "list")[1]
    assert all(word in out for word in (first, second, "evt_1", "build → ci", "exhausted", "500", "0@2: gw_v: got 9"))
    letters = lines(run("dead", "list", "--json")[1])
    assert [(letter.get("event_id"), letter["reason"], letter["status"]) for letter in letters] == [
        (None, "undecodable", "open"),
        ("evt_2", "gone", "open"),
        ("evt_1", "exhausted", "open"),
    ]
    assert letters[2]["delivery_id"] == first
    assert (letters[2]["attempts"], letters[2]["last_result"]) == (2, "500")
    assert [letter["event_id"] for letter in lines(run("dead", "list", "--route", "other", "--json")[1])] == ["evt_2"]

    assert run("dead", "replay", "--route", "other", "--no-wait")[0] == 0
    assert len(lines(run("dead", "list", "--json")[1])) == 3  # not before it's done
    carry_out(stored()[-1], count=1)
    assert len(lines(run("dead", "list", "--json")[1])) == 2
    statuses = [letter["status"] for letter in lines(run("dead", "list", "--all", "--json")[1])]
    assert statuses == ["open", "replayed", "open"]


@pytest.mark.usefixtures("log")
def test_dead_letters_are_grouped(run: Run) -> None:
    for number in range(3):
        write_dead_letter(f"evt_{number}")
    write_dead_letter("evt_3", reason="gone")
    out = run("dead", "list", "--limit", "2")[1].splitlines()
    groups = [line.split() for line in out[2:4]]
    assert [group[:3] for group in groups] == [["3", "exhausted", "500"], ["1", "gone", "500"]]
    assert groups[0][3:6] == ["build", "→", "ci"]
    assert "the newest 2 of 4" in run("dead", "list", "--limit", "2")[2]


@pytest.mark.usefixtures("log")
def test_an_empty_dead_list_says_so(run: Run) -> None:
    assert run("dead", "list") == (0, "no open dead letters\n", "")
    assert run("dead", "list", "--json") == (0, "", "")
    told = "--destination: 'nosuch' isn't in the local rules"
    assert run("dead", "list", "--destination", "nosuch") == (0, "no open dead letters\n", f"{told}\n")


@pytest.mark.usefixtures("log")
def test_a_cut_list_of_dead_letters_says_so(run: Run) -> None:
    for number in range(3):
        write_dead_letter(f"evt_{number}")
    assert run("dead", "list", "--limit", "2")[2] == "the newest 2 of 3; --limit shows more\n"
    assert run("dead", "list", "--limit", "2", "--json")[2] == "there are more than 2; --limit shows more\n"
    assert run("dead", "list", "--limit", "3")[2] == ""


@pytest.mark.usefixtures("log")
def test_a_dead_letter_is_shown_whole(run: Run) -> None:
    first = write_dead_letter("evt_1", body=b"\xffAB")
    write_dead_letter("evt_1", route="other")
    out = run("dead", "show", first)[1]
    for word in (first, "build → ci", "exhausted: 500 after 2 attempts", "503: later", "X-One: 1", "ff41 42", "open"):
        assert word in out
    both = lines(run("dead", "show", "evt_1", "--json")[1])
    assert [letter["route"] for letter in both] == ["other", "build"]
    assert both[1]["body_base64"] == "/0FC"
    assert [attempt["status"] for attempt in both[1]["attempts"]] == [503, 500]
    assert run("dead", "show", "evt_2")[0] == 1


@pytest.mark.usefixtures("log")
def test_a_replay_is_stored_for_the_running_gateway(run: Run) -> None:
    first = write_dead_letter("evt_1")
    code, out, _ = run("dead", "replay", "evt_1", "--timeout", "0s")
    assert (code, out) == (
        1,
        f"the command is recorded; {UNBEGUN}. To see what came of it:\n  gateway dead list\n",
    )
    code, out, _ = run("dead", "replay", "--reason", "exhausted", "--since", "1h", "--no-wait", "--json")
    assert code == 0
    (told,) = lines(out)
    assert (told["state"], told["count"]) == ("requested", None)
    one, other = stored()
    assert (one.state, one.action, one.filter) == ("requested", "replay", DeadFilter(ids=(first,)))
    assert one.checkpoint == {f"{TOPICS.dead}/0": 1}
    assert other.filter.reason == "exhausted"
    assert other.filter.since == pytest.approx(other.at - 3600, abs=5)
    assert told["command"] == other.key


@pytest.mark.usefixtures("log")
def test_a_replay_that_would_be_everything_has_to_be_asked_for(run: Run) -> None:
    write_dead_letter("evt_1")
    assert run("dead", "replay")[0] == 2
    assert run("dead", "drop")[0] == 2
    assert stored() == []
    run("dead", "replay", "--all", "--no-wait")
    assert stored()[0].filter == DeadFilter()


@pytest.mark.usefixtures("log")
def test_a_name_without_a_dead_letter_is_refused(run: Run) -> None:
    code, _, err = run("dead", "replay", "evt_9")
    assert (code, err) == (2, "error: evt_9: expected the id of an open dead letter, got none\n")
    assert stored() == []


@pytest.mark.usefixtures("log")
def test_a_dry_run_only_counts(run: Run) -> None:
    write_dead_letter("evt_1")
    write_dead_letter("evt_2")
    write_dead_letter("evt_3", route="other")
    code, out, _ = run("dead", "replay", "--all", "--dry-run")
    assert code == 0
    assert "would replay 3 dead letters; nothing was done" in out
    counted = lines(run("dead", "drop", "--route", "build", "--dry-run", "--json")[1])
    assert counted == [{"route": "build", "destination": "ci", "reason": "exhausted", "count": 2}]
    assert stored() == []


@pytest.mark.usefixtures("log")
def test_a_name_that_the_rules_lack_is_told_where_there_is_no_dead_letter_of_it(run: Run) -> None:
    write_dead_letter("evt_1", route="gone")
    unknown = "--route: 'biuld' isn't in the local rules, did you mean 'build'?"
    for words in (("dead", "replay", "--dry-run"), ("dead", "drop", "--dry-run")):
        assert unknown in run(*words, "--route", "biuld")[2]
        assert "local rules" not in run(*words, "--route", "gone")[2], "it has one"


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("words", [("dead", "replay"), ("dead", "drop", "--yes")])
def test_a_name_that_the_rules_lack_is_told_once_a_gateway_has_found_none_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    found = 0

    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return placed.command.with_state("done", count=found)

    monkeypatch.setattr(ControlClient, "finished", ended)
    code, out, err = run(*words, "--route", "biuld")
    assert (code, " 0 dead letters" in out) == (0, True)
    assert err == "--route: 'biuld' isn't in the local rules, did you mean 'build'?\n"
    found = 1
    assert run(*words, "--route", "biuld")[2] == ""


class Terminal(io.StringIO):
    """A terminal, on which somebody has typed something."""

    @override
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("log")
def test_a_drop_asks_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dead_letter("evt_1")
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = run("dead", "drop", "--all", "--no-wait")
    assert code == 1
    assert "drop 1 dead letter? [y/N]" in err
    assert "nothing was dropped" in out
    assert stored() == []
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert run("dead", "drop", "--all", "--no-wait")[0] == 0
    assert run("dead", "drop", "--all", "--no-wait", "--yes")[0] == 0
    assert [command.action for command in stored()] == ["drop", "drop"]


@pytest.mark.usefixtures("log")
def test_a_drop_is_about_what_was_counted_when_it_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dead_letter("evt_1")

    def confirm(_: Output, question: str) -> bool:
        assert question == "drop 1 dead letter?"
        other = threading.Thread(target=write_dead_letter, args=("evt_2",))
        other.start()
        other.join()
        return True

    monkeypatch.setattr(Output, "is_interactive", property(lambda _: True))
    monkeypatch.setattr(Output, "confirm", confirm)
    assert run("dead", "drop", "--destination", "ci", "--no-wait")[0] == 0
    (command,) = stored()
    assert (sum(command.checkpoint.values()), command.latest is None) == (1, False)


@pytest.mark.usefixtures("log")
def test_a_drop_that_nobody_can_be_asked_about_needs_to_be_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dead_letter("evt_1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for words in (["--all"], ["--route", "build", "--json"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n") if "--json" not in words else Terminal("y\n"))
        code, _, err = run("dead", "drop", "--no-wait", *words)
        assert code == 2
        assert "expected --yes, since it can't ask; it would drop 1 dead letter" in err
    assert stored() == []
    assert run("dead", "drop", "--all", "--no-wait", "--yes", "--json")[0] == 0


# ---- Replays ----


@pytest.mark.usefixtures("log")
def test_a_replay_of_events_is_stored_for_the_running_gateway(run: Run) -> None:
    for number in range(3):
        write_event(f"evt_{number}")
    code, out, err = run("replay", "--route", "build", "--from", "1h", "--rate", "10/m", "--no-wait")
    (command,) = stored()
    assert (code, out, err) == (
        0,
        f"replay {command.name} of route build is stored; a running gateway will carry it out\n",
        "",
    )
    place = f"{TOPICS.events('github')}/0"
    assert (command.kind, command.state, command.checkpoint) == ("replay", "requested", {place: 3})
    assert command.selection is not None
    since = command.selection.since
    assert since == pytest.approx(command.at - 3600, abs=5)
    assert command.selection == Selection(route="build", since=since, rate=1 / 6, starts={place: 0})


@pytest.mark.usefixtures("log")
def test_the_time_of_a_replay_may_be_a_moment(run: Run) -> None:
    write_event("evt_1")
    words = ["--route", "build", "--from", "2020-01-01T01:00:00+01:00", "--destination", "ci", "--source", "github"]
    code, out, _ = run("replay", *words, "--to", "2030-01-01T00:00:00Z", "--no-wait", "--json")
    (command,) = stored()
    assert code == 0
    assert lines(out) == [{"replay": command.name, "state": "requested", "scanned": 0, "total": 1, "injected": 0}]
    assert command.selection is not None
    assert (command.selection.since, command.selection.until) == (1577836800.0, 1893456000.0)
    assert (command.selection.destination, command.selection.source) == ("ci", "github")
    code, _, err = run("replay", *words, "--to", "2019-12-31T00:00:00Z")
    assert (code, err) == (2, "error: --from: expected a time before --to, got 2020-01-01T00:00:00.000Z\n")
    code, _, err = run("replay", "--route", "build", "--from", "2200-01-01T00:00:00Z")
    assert (code, err) == (2, "error: --from: expected a time before now, got 2200-01-01T00:00:00.000Z\n")
    code, out, _ = run("replay", *words, "--to", "2020-01-02T00:00:00Z")
    assert (code, out) == (0, "no events were stored in that time: there is nothing to do\n")
    assert len(stored()) == 1


@pytest.mark.usefixtures("log")
def test_a_dry_run_of_a_replay_counts_what_the_rules_match(run: Run) -> None:
    for number in range(3):
        write_event(f"evt_{number}", type="push" if number else "issues")
    write_event("evt_crm", source="crm", topic="company.crm", type="signup")
    code, out, _ = run("replay", "--route", "build", "--from", "1h", "--dry-run")
    assert code == 0
    assert out.splitlines()[0] == "route build"
    assert out.splitlines()[3].split() == ["github", "push", "2"]
    *_, known, told, command = out.splitlines()
    assert known == "2 deliveries match; as far as the log shows, 0 missed or dead-lettered; 2 unknown"
    write_dead_letter("evt_1", part=Part(0, "0" * 32))
    _, _, err = run("replay", "--route", "build", "--from", "1h", "--undelivered", "--dry-run")
    assert err == "1 dead letter of items: not counted; `gateway dead replay --route build` delivers them\n"
    assert told == "would queue 2 deliveries: 2 events to ci; nothing was done"
    write_event("evt_late")
    code, again, _ = run(*command.removeprefix("to replay exactly these: gateway ").split(), "--dry-run")
    assert (code, again) == (0, out), "what has come since is left out"
    code, out, _ = run("replay", "--route", "customers", "--from", "1h", "--dry-run", "--json")
    assert code == 0
    assert lines(out) == [
        {
            "route": "customers",
            "source": "crm",
            "type": "signup",
            "count": 1,
            "deliveries": 1,
            "matching": 1,
            "undelivered": 0,
            "unknown": 1,
        }
    ]
    assert stored() == []


def write_reading(route: str, offset: int, at: float, **fields: Any) -> None:
    """Say that the events from an offset on are routed by rules with this route alone."""
    revision = routing_revision(rules_of(a_route(route, **({"match": {"type": "push"}} | fields))))
    place = f"{TOPICS.events('github')}/0"
    for command in (
        ControlRecord(kind="rules", name=revision.name, state="done", at=at, routes=encode(revision, None)),
        ControlRecord(
            kind="routed", name=route, state="done", at=at, checkpoint={place: offset}, revision=revision.name
        ),
    ):
        give(command)


ENDED = "delivered, dropped or on their way (`gateway status` shows what waits)"


@pytest.mark.usefixtures("log")
def test_deliveries_a_route_already_made_are_counted_and_can_be_skipped(run: Run) -> None:
    for number in range(5):
        write_event(f"evt_{number}")
    began = int(time.time()) - 60 + 0.7719998  # told as the millisecond after it
    write_reading("before", 0, began)
    words = ["replay", "--route", "build", "--from", "1h"]
    told = "5 deliveries match; as far as the log shows, 5 missed or dead-lettered\n"
    assert told in run(*words, "--dry-run")[1]
    write_reading("build", 1, began + 30)
    code, out, err = run(*words, "--dry-run")
    assert (code, out.splitlines()[-3:-1]) == (
        0,
        [
            f"5 deliveries match; as far as the log shows, 1 missed or dead-lettered; 4 {ENDED}",
            "would queue 5 deliveries: 5 events to ci; nothing was done",
        ],
    )
    moment = rfc3339(began + 30)
    assert err == (
        f"route build, or the `dedupe` of its sources, last changed at {moment}; events after that were already "
        f"routed by the current rules: use --to {moment} or --undelivered to leave them out\n"
    )
    code, out, err = run(*words, "--undelivered", "--dry-run")
    *_, told, command = out.splitlines()
    assert (code, told, err) == (0, "would queue 1 delivery: 1 event to ci; nothing was done", "")
    assert command.endswith(" --undelivered")
    assert run(*words, "--undelivered", "--no-wait")[0] == 0
    (replay,) = [each for each in stored() if each.kind == "replay"]
    assert replay.selection is not None
    assert replay.selection.undelivered
    err = run(*words, "--to", moment, "--dry-run")[2]
    assert f"replay {replay.name} of route build hasn't ended: what it queues may be counted here, too" in err
    give(replay.with_state("done", count=1))
    assert run(*words, "--to", moment, "--dry-run")[2] == ""


@pytest.mark.usefixtures("log")
def test_a_waiting_retry_is_not_called_delivered(run: Run) -> None:
    write_reading("build", 0, time.time() - 60)
    for number in range(7):
        write_event(f"evt_{number}")
    words = ["replay", "--route", "build", "--from", "1h", "--undelivered"]
    told = f"7 deliveries match; as far as the log shows, 0 missed or dead-lettered; 7 {ENDED}"
    assert run(*words, "--dry-run")[1].splitlines()[-3] == told

    queued = "queued 0 deliveries by build, from 7 records of events"
    left_out = (
        "; left out is what was delivered or dropped, is on its way (`gateway status` shows what waits) or unknown"
    )
    for asked, more in ((words, left_out), (words[:-1], "")):
        run(*asked, "--no-wait")
        carry_out(stored()[-1], count=0)
        assert run("replay", "--follow", stored()[-1].name)[:2] == (0, f"{queued}{more}\n")


@pytest.mark.usefixtures("log")
def test_one_replay_covers_all_routes_of_a_source(run: Run) -> None:
    more = "  - {name: all, from: [github, crm], to: [ci, audit]}\n"
    Path("routes.yaml").write_text(RULES.replace("destinations:", 'destinations:\n  audit: {url: "http://a/"}') + more)
    for number in range(5):
        write_event(f"evt_{number}", type="push" if number % 2 else "issues")
    write_event("evt_crm", source="crm", topic="company.crm")
    write_reading("before", 0, time.time() - 60)
    words = ["replay", "--source", "github", "--from", "1h", "--undelivered"]
    code, out, _ = run(*words, "--dry-run")
    told = [line for line in out.splitlines() if line.startswith(("would", "in all", "route"))]
    assert (code, told) == (
        0,
        [
            "route build",
            "would queue 2 deliveries: 2 events to ci; nothing was done",
            "route all",
            "would queue 10 deliveries: 5 events to ci, audit; nothing was done",
            "in all, would queue 12 deliveries by 2 routes",
        ],
    )
    command = out.splitlines()[-1].removeprefix("to replay exactly these: gateway ")
    assert run(*command.split(), "--dry-run")[1] == out
    code, out, _ = run(*words, "--dry-run", "--json")
    assert {(each["route"], each["type"]): each["deliveries"] for each in lines(out)} == {
        ("build", "push"): 2,
        ("all", "push"): 4,
        ("all", "issues"): 6,
    }
    assert run(*words, "--no-wait")[0] == 0
    place = f"{TOPICS.events('github')}/0"
    asked = [(each.selection, each.checkpoint) for each in stored() if each.kind == "replay"]
    assert [(one.route, one.source, one.undelivered, one.starts, ends) for one, ends in asked if one is not None] == [
        (route, "github", True, {place: 0}, {place: 5}) for route in ("build", "all")
    ]
    assert run("replay", "--destination", "audit", "--from", "1h", "--undelivered", "--no-wait")[0] == 0
    assert [each.selection.route for each in stored() if each.selection is not None] == ["build", "all", "all"]


@pytest.mark.usefixtures("log")
def test_a_dry_run_says_to_which_destinations_deliveries_would_go(run: Run) -> None:
    more = "  - {name: all, from: github, to: [ci, audit, chat]}\n"
    rules = RULES.replace("destinations:", 'destinations:\n  audit: {url: "http://a/"}\n  chat: {url: "http://c/"}')
    Path("routes.yaml").write_text(rules + more)
    write_reading("all", 0, time.time() - 60, match=None, to=("ci", "audit", "chat"))
    words = ["replay", "--route", "all", "--from", "1h", "--undelivered", "--dry-run"]
    for number in range(3):
        write_event(f"evt_{number}", body=b'{"a":1}')
    queued = run(*words)[1].splitlines()[-2]
    assert queued == "would queue 0 deliveries; nothing was done"
    for number in range(3):
        write_dead_letter(f"evt_{number}", route="all", destination="chat")
    queued = run(*words)[1].splitlines()[-2]
    assert queued == "would queue 3 deliveries: 3 events to chat; nothing was done"
    write_dead_letter("evt_1", route="all", destination="audit")
    queued = run(*words)[1].splitlines()[-2]
    assert queued == "would queue 4 deliveries of 3 events: 1 to audit, 3 to chat; nothing was done"


@pytest.mark.usefixtures("log")
def test_one_event_is_replayed_by_each_route_that_matches_it(run: Run) -> None:
    more = "  - {name: all, from: github, to: [ci, audit]}\n"
    Path("routes.yaml").write_text(RULES.replace("destinations:", 'destinations:\n  audit: {url: "http://a/"}') + more)
    for number in range(3):
        write_event(f"evt_{number}")
    place = f"{TOPICS.events('github')}/0"
    code, out, _ = run("replay", "--event", "evt_1", "--dry-run")
    assert (code, out.splitlines()) == (
        0,
        [
            "would queue 1 delivery: evt_1 by build to ci; nothing was done",
            "would queue 2 deliveries: evt_1 by all to ci, audit; nothing was done",
        ],
    )
    assert stored() == []
    code, out, _ = run("replay", "--event", "evt_1", "--destination", "ci", "--no-wait", "--json")
    assert (code, [one["total"] for one in lines(out)]) == (0, [1, 1])
    starts, ends = {place: 1}, {place: 2}
    assert [(command.selection, command.checkpoint) for command in stored()] == [
        (Selection(route=route, destination="ci", since=0.0, starts=starts), ends) for route in ("build", "all")
    ]
    assert run("replay", "--event", f"{place}@2", "--route", "all", "--no-wait")[0] == 0
    assert stored()[-1].selection == Selection(route="all", since=0.0, starts={place: 2})


@pytest.mark.usefixtures("log")
def test_an_unreplayable_event_is_refused(run: Run) -> None:
    write_event("evt_1", type="issues")
    where = "expected the id of an event in the log, or its position, got neither"
    for name in ("evt_2", f"{TOPICS.events('github')}/0@5", "none/0@0"):
        assert run("replay", "--event", name) == (1, "", f"error: {name}: {where}\n")
    why = "to match it, got none; `gateway explain evt_1` says why"
    for words, wanted in (
        ((), "a route"),
        (("--route", "build"), "build"),
        (("--destination", "ci"), "a route to ci"),
    ):
        assert run("replay", "--event", "evt_1", *words) == (2, "", f"error: evt_1: expected {wanted} {why}\n")
    assert run("replay", "--event", "evt_1", "--from", "1h")[0] == 2
    assert run("replay", "--event", "evt_1", "--route", "biuld")[0] == 2
    assert stored() == []


@pytest.mark.usefixtures("log")
def test_a_replay_is_followed_to_its_end(run: Run) -> None:
    write_event("evt_1")
    write_event("evt_2")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    (command,) = stored()
    code, _, err = run("replay", "--follow", command.name, "--timeout", "0s")
    assert code == 1
    assert f"replay {command.name} made no progress: is a gateway running?" in err
    checkpoint = ControlRecord(
        kind="checkpoint",
        name=command.key,
        state="done",
        at=NOW,
        checkpoint=dict.fromkeys(command.checkpoint, 1),
        count=1,
    )
    key, value = checkpoint.encode()
    on_log(lambda log: log.append(TOPICS.control, key=key, value=value, headers=[]))
    told = {"replay": command.name, "total": 2}
    code, out, _ = run("replay", "--follow", command.name, "--timeout", "0s", "--json")
    assert (code, lines(out)) == (1, [told | {"state": "requested", "scanned": 1, "injected": 1}])
    carry_out(command, count=2)
    code, out, _ = run("replay", "--follow", command.name, "--json")
    assert (code, lines(out)) == (0, [told | {"state": "done", "scanned": 2, "injected": 2}])
    assert run("replay", "--follow", command.name)[:2] == (
        0,
        f"queued 2 deliveries by build, from 2 records of events: {DUE}\n",
    )
    code, _, err = run("replay", "--follow", "other")
    assert (code, err) == (2, "error: --follow: expected the ID of a replay, got 'other'\n")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    code, _, err = run("replay", "--follow", "other")
    assert err.endswith(f"got 'other'; under way: {stored()[-1].name}\n")


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("reports", [True, False])
def test_a_cancelled_replay_says_how_many_deliveries_it_had_queued(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, reports: bool
) -> None:
    for number in range(9):
        write_event(f"evt_{number}")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    (command,) = stored()
    ledger: list[str] = []

    def queue(number: int, *, is_last: bool = False) -> None:
        """Queue the next deliveries, and publish that, as the running gateway does."""
        for _ in range(number):
            ledger.append(f"evt_{len(ledger)}")
            write_waiting(event_id=ledger[-1])
        reached = dict.fromkeys(command.checkpoint, len(ledger))
        marker = ControlRecord(
            kind="checkpoint", name=command.key, state="done", at=NOW, checkpoint=reached, count=len(ledger)
        )
        give(marker.with_state("cancelled", covers_commands_below=100) if is_last else marker)

    queue(4)
    if reports:  # what was under way when it was cancelled is still queued, and then told
        place = ControlClient.cancel

        async def cancel(client: ControlClient, name: str) -> StoredCommand | None:
            placed = await place(client, name)
            await asyncio.to_thread(queue, 3, is_last=True)
            return placed

        monkeypatch.setattr(ControlClient, "cancel", cancel)
    code, out, _ = run("replay", "--cancel", command.name, "--timeout", "1s")
    more = "" if reports else " or more: no gateway reported where it stopped"
    assert (code, out) == (0, f"replay {command.name} is cancelled after {len(ledger)} deliveries{more}\n")
    assert len(ledger) == (7 if reports else 4)


@pytest.mark.usefixtures("log")
def test_a_replay_that_waits_for_a_partition_does_not_call_itself_complete(run: Run) -> None:
    write_event("evt_1")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    (command,) = stored()
    reached = dict.fromkeys(command.checkpoint, 1)
    give(
        ControlRecord(kind="checkpoint", name=command.key, state="done", at=NOW, checkpoint=reached, count=1, unread=2)
    )
    code, out, err = run("replay", "--follow", command.name, "--timeout", "0s")
    assert (code, out) == (1, "")
    assert "queued 1 delivery by build, from 1 record of events by now; 2 partitions can't be read" in err
    assert f"{command.name} isn't complete, and continues with them by itself" in err
    code, out, _ = run("replay", "--follow", command.name, "--timeout", "0s", "--json")
    [told] = lines(out)
    assert (code, told["state"], told["unreadable_partitions"]) == (1, "requested", 2)
    carry_out(command, count=1, unread=1, detail="gateway.dead/1")
    code, out, _ = run("replay", "--follow", command.name)
    assert (code, out.endswith(f": {DUE}; 1 partition can't be read: not included\n")) == (0, True)


@pytest.mark.usefixtures("log")
def test_a_replay_of_an_ordered_route_says_that_it_keeps_no_order(run: Run) -> None:
    Path("routes.yaml").write_text(RULES.replace("match: {type: push}", "match: {type: push}, order: key"))
    write_event("evt_1", key="shop")
    code, _, err = run("replay", "--route", "build", "--from", "1h", "--no-wait")
    assert (code, err) == (0, "route build is ordered, but a replay isn't\n")


@pytest.mark.usefixtures("log")
def test_a_replay_is_cancelled(run: Run) -> None:
    write_event("evt_1")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    (command,) = stored()
    code, out, _ = run("replay", "--cancel", command.name, "--no-wait")
    told = "is cancelled after 0 deliveries or more: no gateway reported where it stopped"
    assert (code, out) == (0, f"replay {command.name} {told}\n")
    assert [command.state for command in stored()] == ["cancelled"]
    code, _, err = run("replay", "--follow", command.name)
    assert code == 1
    assert f"replay {command.name} was cancelled after 0 deliveries by build, from 0 records of events" in err
    code, _, err = run("replay", "--cancel", command.name)
    told = f"error: --cancel: expected the ID of a replay that hasn't ended, got '{command.name}'\n"
    assert (code, err) == (2, told)


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("more", [(), ("--api", "http://127.0.0.1:1")], ids=["by log", "by api"])
def test_options_that_a_replay_would_ignore_are_refused(run: Run, more: tuple[str, ...]) -> None:
    write_event("evt_1")
    run("replay", "--route", "build", "--from", "1h", "--no-wait")
    (command,) = stored()
    for words, told in (
        (("--cancel", command.name, "--dry-run"), "--no-wait, --timeout and --why with it, got --dry-run"),
        (("--cancel", command.name, "--route", "build"), "--no-wait, --timeout and --why with it, got --route"),
        (("--follow", command.name, "--no-wait", "--why", "x"), "--timeout with it, got --no-wait, --why"),
        (("--follow", command.name, "--from", "1h", "--rate", "1/s"), "--timeout with it, got --from, --rate"),
        (
            ("--event", "evt_1", "--rate", "1/s", "--undelivered"),
            "--route, --destination, --dry-run, --no-wait, --timeout and --why with it, got --undelivered, --rate",
        ),
    ):
        refused = f"error: replay {words[0]}: expected only {told}; nothing was done\n"
        assert run("replay", *words, *more) == (2, "", refused)
    assert stored() == [command]


# ---- Routes and destinations ----


@pytest.mark.usefixtures("log")
def test_a_destination_is_paused_and_resumed(run: Run) -> None:
    code, out, _ = run("destination", "pause", "ci")
    told = (
        "the pause of destination ci is recorded; no process has confirmed it: is a gateway running? "
        "Once one has read it, its deliveries wait until `gateway destination resume ci`\n"
    )
    assert (code, out) == (1, told)
    (paused,) = stored()
    assert (paused.key, paused.state) == ("pause/destination/ci", "paused")
    code, out, _ = run("destination", "resume", "ci", "--no-wait", "--json")
    assert (code, lines(out)) == (0, [{"command": "pause/destination/ci", "state": "resuming", "count": None}])
    carry_out(stored()[-1], count=4)
    assert run("destination", "resume", "ci")[:2] == (0, "destination ci isn't paused: there is nothing to do\n")


def confirm() -> None:
    """Read all commands, as the owner of the jobs does."""

    async def read(log: Log) -> None:
        end = (await log.bounds(TOPICS.control))[0][1]
        consumer = await log.consume(group=TOPICS.group(JOBS_GROUP), topics=[TOPICS.control], listener=Silent())
        await consumer.fetch(timeout=1.0)
        await consumer.commit({Partition(TOPICS.control, 0): Commit(end)})
        await consumer.close()

    on_log(read, owner=True)


@pytest.mark.usefixtures("log")
def test_a_pause_is_called_one_once_a_process_has_read_it(run: Run) -> None:
    code, out, _ = run("destination", "pause", "ci", "--no-wait", "--json")
    assert (code, lines(out)[0]["confirmed"]) == (0, None)
    assert lines(run("destination", "pause", "ci", "--json")[1])[0]["confirmed"] is False
    confirm()
    code, out, _ = run("destination", "pause", "ci", "--json")
    assert (code, lines(out)[0]["confirmed"]) == (0, True)
    code, out, _ = run("destination", "pause", "ci")
    assert (code, out.startswith("destination ci is paused already, by ")) == (0, True)
    assert run("route", "pause", "build")[0] == 1, "that one isn't read"


@pytest.mark.usefixtures("log")
def test_a_command_without_an_outcome_in_time_says_whether_a_gateway_carries_it_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, follows = "the command is recorded; ", ". To see what came of it:\n  gateway status ci\n"
    kick = ("destination", "kick", "ci")
    assert run(*kick, "--timeout", "0s")[:2] == (1, recorded + UNBEGUN + follows)
    assert run(*kick, "--no-wait")[:2] == (0, f"{recorded}it is carried out once a gateway runs{follows}")
    assert "begun" not in lines(run(*kick, "--no-wait", "--json")[1])[0]
    assert lines(run(*kick, "--timeout", "0s", "--json")[1])[0]["begun"] is False

    async def announced(client: ControlClient, placed: StoredCommand, *, timeout: float) -> None:  # noqa: ARG001 - the signature
        name = announcement_key(placed.command.key)
        hold = ControlRecord(
            kind="checkpoint", name=name, state="done", at=NOW, covers_commands_below=placed.offset + 1
        )
        await client._place(hold)

    monkeypatch.setattr(ControlClient, "finished", announced)
    told = "a gateway is carrying it out, which has taken longer than --timeout so far"
    assert run(*kick, "--timeout", "2s")[:2] == (1, recorded + told + follows)
    assert lines(run(*kick, "--timeout", "2s", "--json")[1])[0]["begun"] is True
    out = run("route", "kick", "build", "--timeout", "2s")[1]
    assert out == f"{recorded}{told}. To see what came of it:\n  gateway status\n"


UNBEGUN = "no gateway has begun to carry it out within --timeout: is one running? It is carried out once one runs"


@pytest.mark.usefixtures("log")
def test_a_pause_that_one_process_has_read_says_so_and_no_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(_: ControlClient, pause: Pause, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return pause.command

    monkeypatch.setattr(ControlClient, "confirmed", read)
    told = (
        "destination ci is paused: one process has read it, any others follow within a moment; "
        "its deliveries wait until `gateway destination resume ci`\n"
    )
    assert run("destination", "pause", "ci")[:2] == (0, told)
    out = run("destination", "pause", "ci")[1]
    assert out.startswith("destination ci is paused already, by ")
    assert "one process" in out


@pytest.mark.usefixtures("log")
def test_a_pause_that_was_resumed_meanwhile_is_not_called_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("destination", "pause", "ci", "--no-wait")
    (paused,) = stored()
    run("destination", "resume", "ci", "--no-wait")
    confirm()

    async def stored_first(_client: ControlClient, _name: str) -> Pause:
        return Pause(paused, is_new=True, offset=0)

    monkeypatch.setattr(ControlClient, "pause", stored_first)
    code, out, _ = run("destination", "pause", "ci")
    told = f"destination ci isn't paused any more: it was resumed meanwhile, by {paused.by}\n"
    assert (code, out) == (1, told)
    (line,) = lines(run("destination", "pause", "ci", "--json")[1])
    assert (line["state"], line["confirmed"]) == ("resuming", False)


@pytest.mark.usefixtures("log")
def test_a_repeated_pause_reports_who_and_since_when(run: Run) -> None:
    run("destination", "pause", "ci")
    (paused,) = stored()
    code, out, _ = run("destination", "pause", "ci")
    told = f"the pause of destination ci is recorded already, by {paused.by} since {when(paused.at)}; no process"
    assert (code, out.startswith(told)) == (1, True)
    assert stored() == [paused]
    since = {"by": paused.by, "since": rfc3339(paused.at)}
    (line,) = lines(run("destination", "pause", "ci", "--json")[1])
    assert line == {"name": "destination/ci", "state": "paused", **since, "already": True, "confirmed": False}


@pytest.mark.usefixtures("log")
def test_a_route_is_kicked(run: Run) -> None:
    assert run("route", "kick", "build", "--no-wait")[0] == 0
    (kick,) = stored()
    assert (kick.key, kick.state) == ("kick/route/build", "requested")


@pytest.mark.usefixtures("log")
def test_a_pause_takes_the_shared_flags(run: Run) -> None:
    for flags, ended in ((("--no-wait",), 0), (("--timeout", "5s"), 1)):
        code, out, _ = run("route", "pause", "build", *flags)
        assert code == ended
        assert out.startswith("the pause of route build is recorded")
    assert [command.state for command in stored()] == ["paused"]


@pytest.mark.parametrize(
    ("action", "number", "told"),
    [
        (
            "kick",
            0,
            "kicked route build: nothing was waiting; where a breaker is open, the next delivery is the probe\n",
        ),
        ("kick", 1, "kicked route build: 1 tried now\n"),
        ("kick", 1200, "kicked route build: 1,200 tried now\n"),
        ("resume", 1, "resumed route build: 1 paused delivery queued\n"),
        ("resume", 2, "resumed route build: 2 paused deliveries queued\n"),
    ],
)
@pytest.mark.usefixtures("log")
def test_one_delivery_is_spoken_of_as_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, action: str, number: int, told: str
) -> None:
    async def done(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:
        assert timeout == 30.0
        return placed.command.with_state("done", count=number, tried=number)

    monkeypatch.setattr(ControlClient, "finished", done)
    if action == "resume":
        run("route", "pause", "build")
    assert run("route", action, "build")[:2] == (0, told)


@pytest.mark.parametrize(
    ("action", "state", "told"),
    [
        (
            "kick",
            "done",
            "kicked route build: 1 tried now",
        ),
        ("resume", "cancelled", "route build was paused again: 1 delivery had already been resumed"),
    ],
)
@pytest.mark.usefixtures("log")
def test_a_command_taken_back_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, action: str, state: State, told: str
) -> None:
    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return placed.command.with_state(state, count=1, tried=1)

    monkeypatch.setattr(ControlClient, "finished", ended)
    if action == "resume":
        run("route", "pause", "build")
    code, out, _ = run("route", action, "build")
    assert (code, out) == (state == "cancelled", told + "\n")


@pytest.mark.parametrize(
    ("finished", "told"),
    [
        (3, "nothing waited for a retry; on ordered routes 3 waited, none waits now"),
        (1, "nothing waited for a retry; on ordered routes 3 waited, 2 of them still wait"),
        (0, "nothing waited for a retry; on ordered routes 3 waited, 3 of them still wait"),
    ],
)
@pytest.mark.usefixtures("log")
def test_a_kick_of_an_ordered_route_reports_each_fate(
    run: Run, monkeypatch: pytest.MonkeyPatch, finished: int, told: str
) -> None:
    topic, group = TOPICS.ordered("build", "ci"), TOPICS.ordered_group("build", "ci")
    places: list[Position] = []

    async def wait(log: Log) -> None:
        await log.create(TOPICS.specs((), [("build", "ci")]))
        for number in range(3):
            headers = encode_delivery(a_delivery(id=f"dlv_{number}"), NO_METADATA, at=0.0)
            places.append(await log.append(topic, key=b"k", value=b"{}", headers=headers))

    on_log(wait, owner=True)

    async def done(client: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        if finished:
            # Not the first, unless all are: its key is blocked.
            commit = Commit(3) if finished == 3 else Commit(0, bytes([0b100]))
            await client._log.seed(group, {Partition(topic, places[0].partition): commit})
        return placed.command.with_state("done", count=0, tried=0)

    monkeypatch.setattr(ControlClient, "finished", done)
    assert run("route", "kick", "build")[:2] == (0, f"kicked route build: {told}\n")
    if finished == 3:
        assert lines(run("route", "kick", "build", "--json")[1])[0].get("ordered") is None


@pytest.mark.usefixtures("log")
def test_a_kick_of_an_ordered_route_reports_attempts_responses_and_pauses(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = RULES.replace("to: ci}", "to: ci, order: key, on_exhausted: halt}", 1)
    Path("routes.yaml").write_text(rules)

    async def wait(log: Log) -> None:
        await log.create(TOPICS.specs((), [("build", "ci")]))
        for number in range(3):
            headers = encode_delivery(a_delivery(id=f"dlv_{number}"), NO_METADATA, at=0.0)
            await log.append(TOPICS.ordered("build", "ci"), key=b"k", value=b"{}", headers=headers)

    on_log(wait, owner=True)
    fate: dict[str, Any] = {
        "tried": 1,
        "delivered": 0,
        "untried_by_reason": {"behind": 2},
        "failed_by_result": {"401": 1},
        "repeated_failures": {"401": 1},
    }

    async def done(client: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        for name in (announcement_key(placed.command.key), tried_name("build", "ci", 0)):
            checkpoint = ControlRecord(
                kind="checkpoint", name=name, state="done", at=placed.command.at, count=3, **fate
            )
            await client._place(checkpoint)
        return placed.command.with_state("done", count=0, tried=0)

    monkeypatch.setattr(ControlClient, "finished", done)
    told = "1 tried now: 1 got 401 again; 2 wait (behind an earlier event of the key)"
    assert run("destination", "kick", "ci")[1] == (
        f"kicked destination ci: nothing waited for a retry; on ordered routes {told}\n  gateway status ci\n"
    )
    ordered = lines(run("destination", "kick", "ci", "--json")[1])[0]["ordered"]
    counts = {
        "tried": 1,
        "delivered": 0,
        "waits": {"behind": 2},
        "failed_by_result": {"401": 1},
        "repeated_failures": {"401": 1},
        "dead": 0,
    }
    assert ordered == {"waited": 3, "waiting": 3, **counts}
    fate["dead"] = 1
    out = run("route", "kick", "build")[1]
    assert "1 got 401 again; 1 became a dead letter; 2 wait" in out
    assert out.endswith("\n  gateway dead list --route build\n")
    fate = {"tried": 0, "delivered": 0, "untried_by_reason": {"paused": 3}}
    run("destination", "pause", "ci")
    assert run("route", "kick", "build")[1] == (
        "kicked route build: nothing waited for a retry; destination ci is paused; on ordered routes 0 tried now, "
        "3 wait (paused)\n  gateway destination resume ci\n"
    )


@pytest.mark.usefixtures("log")
def test_a_kick_whose_attempts_failed_reports_them_and_where_to_look(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    got = {"401": 1200, "503": 4, "timeout": 3, "500": 2, "502": 1, "504": 1, "505": 1}

    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        fate = {
            "tried": 1215,
            "delivered": 3,
            "untried_by_reason": {"throttled": 1},
            "failed_by_result": got,
            "repeated_failures": {"401": 1200, "503": 1},
        }
        return placed.command.with_state("done", count=1216, dead=dead, **fate)

    dead = 0
    monkeypatch.setattr(ControlClient, "finished", ended)
    told, command = run("destination", "kick", "ci")[1].splitlines()
    assert told == (
        "kicked destination ci: 1,215 tried now: 3 delivered, 1,200 got 401 again, 4 got 503 (1 of them again), "
        "3 got timeout, 2 got 500, 1 got 502, 2 got others; 1 waits (Retry-After)"
    )
    assert command == "  gateway status ci"
    dead = 7
    told, *commands = run("destination", "kick", "ci")[1].splitlines()
    assert told.endswith("; 7 became dead letters; 1 waits (Retry-After)")
    assert commands == ["  gateway status ci", "  gateway dead list --destination ci"]
    assert lines(run("destination", "kick", "ci", "--json")[1])[0]["dead"] == 7
    assert lines(run("destination", "kick", "ci", "--json")[1])[0]["failed_by_result"] == got


@pytest.mark.usefixtures("log")
def test_a_name_unknown_to_the_rules_is_refused_with_the_nearest(run: Run) -> None:
    code, _, err = run("route", "pause", "biuld")
    told = "error: unknown route 'biuld', did you mean 'build'?; use --force to do it anyway\n"
    assert (code, err) == (2, told)
    told = "error: unknown destination 'build': that is a route; use --force to do it anyway\n"
    assert run("destination", "kick", "build") == (2, "", told)
    assert "unknown route 'ci': that is a destination; " in run("route", "pause", "ci")[2]
    assert stored() == []
    assert run("route", "pause", "biuld", "--force", "--no-wait")[0] == 0
    code, _, err = run("route", "pause", "other", "--no-wait", "--rules", "none.yaml")
    assert code == 0
    assert "none.yaml can't be read" in err
    line = len(RULES.splitlines()) + 1
    Path("refused.yaml").write_text(RULES + "nonsense: 1\n")
    code, _, err = run("route", "pause", "other", "--no-wait", "--rules", "refused.yaml")
    assert code == 0
    assert f"refused.yaml is refused (refused.yaml:{line}:1: " in err
    assert "so the route 'other' wasn't checked" in err


def write_waiting(*, parked_by: str = "", source: str = "github", event_id: str = "evt_1", **fields: Any) -> None:
    delivery = a_delivery(event=an_event(id=event_id, source=source, received_at=NOW), **fields)
    note = RecordMetadata(
        paused_name=parked_by, spill_reason=SpillReason.PAUSED if parked_by else SpillReason.UNKNOWN_NAME
    )
    topic = TOPICS.parked if parked_by else TOPICS.retry("5s")
    value = delivery.event.body
    on_log(lambda log: log.append(topic, key=b"ci", value=value, headers=encode_delivery(delivery, note, at=NOW)))


@pytest.mark.usefixtures("log")
def test_what_a_kick_has_expedited_and_was_parked_meanwhile_is_counted_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expedited = 2

    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return placed.command.with_state("done", count=2, tried=0, untried_by_reason={"paused": expedited})

    monkeypatch.setattr(ControlClient, "finished", ended)
    run("destination", "pause", "ci")
    for number in range(expedited):
        write_waiting(parked_by="destination/ci", event_id=f"evt_{number}")
    told = "kicked destination ci: 0 tried now, 2 wait (paused); it is paused\n  gateway destination resume ci\n"
    assert run("destination", "kick", "ci")[:2] == (0, told)
    others = 3
    for number in range(others):
        write_waiting(parked_by="destination/ci", event_id=f"evt_other_{number}")
    told = "kicked destination ci: 0 tried now, 2 wait (paused); 3 are stored until it is resumed\n"
    assert run("destination", "kick", "ci")[1] == told + "  gateway destination resume ci\n"
    (fields,) = lines(run("destination", "kick", "ci", "--json")[1])
    assert (fields["waiting"], fields["parked"]) == ({"paused": expedited}, {"destination/ci": others})
    assert parked_besides(
        ControlRecord(kind="kick", name="route/build", state="done", at=0.0, untried_by_reason={"paused": 4}),
        {"route/build": 3, "destination/ci": 2},
    ) == {"route/build": 1}


@pytest.mark.usefixtures("log")
def test_a_kick_of_a_paused_name_reports_parked_ones_and_the_next_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return placed.command.with_state("done", count=0, tried=0)

    monkeypatch.setattr(ControlClient, "finished", ended)
    run("destination", "pause", "ci")
    for number in range(3):
        write_waiting(parked_by="destination/ci", event_id=f"evt_{number}")
    write_waiting(parked_by="destination/ci", event_id="evt_0", successor=2)  # a crash has written it twice
    told = (
        "kicked destination ci: nothing else was waiting; 3 are stored until it is resumed\n"
        "  gateway destination resume ci\n"
    )
    assert run("destination", "kick", "ci")[:2] == (0, told)
    assert lines(run("destination", "kick", "ci", "--json")[1])[0]["parked"] == {"destination/ci": 3}
    told = "kicked route build: nothing else was waiting; 3 are stored until destination ci is resumed\n"
    assert run("route", "kick", "build")[1] == told + "  gateway destination resume ci\n"
    told = "kicked route customers: nothing was waiting; destination ci is paused\n  gateway destination resume ci\n"
    assert run("route", "kick", "customers")[1] == told
    topic = TOPICS.ordered("mirror", "ci")
    headers = encode_delivery(a_delivery(), NO_METADATA, at=0.0)
    on_log(lambda log: log.create(TOPICS.specs((), [("mirror", "ci")])), owner=True)
    on_log(lambda log: log.append(topic, key=b"k", value=b"{}", headers=headers))
    told = (
        "kicked destination ci: nothing waited for a retry; 3 are stored until it is resumed; "
        "on ordered routes 1 waited, 1 of them still waits\n  gateway destination resume ci\n"
    )
    assert run("destination", "kick", "ci")[:2] == (0, told)
    told, _ = parked_text("route build", {"route/build": 1}, 1)
    assert told == "; 1 is stored until it is resumed; 1 partition can't be read: what is stored there isn't counted"


@pytest.mark.usefixtures("log")
def test_leftover_parked_deliveries_are_reported_and_resumed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended(_: ControlClient, placed: StoredCommand, *, timeout: float) -> ControlRecord:  # noqa: ARG001 - the signature
        return placed.command.with_state("active", count=1)

    monkeypatch.setattr(ControlClient, "finished", ended)
    write_waiting(parked_by="route/build")
    code, out, _ = run("status", "ci", "--json")
    found = {each["what"]: each for each in lines(out) if "what" in each}
    assert code == 1
    assert (found["route build"]["count"], found["route build"]["next"]) == (1, ["gateway route resume build"])
    told = "resumed route build, which wasn't paused: 1 paused delivery queued\n"
    assert run("route", "resume", "build")[:2] == (0, told)


@pytest.mark.usefixtures("log")
def test_a_destinations_status_names_its_paused_routes_and_no_unknown_ones(run: Run) -> None:
    run("route", "pause", "build")
    write_waiting(parked_by="route/build")
    code, out, _ = run("status", "ci", "--json")
    found = {each["what"]: each for each in lines(out) if "what" in each}
    assert code == 1
    assert found["route build"]["next"] == ["gateway route resume build"]
    assert found["build → ci"]["why"] == "1 paused"
    assert found["build → ci"]["next"] == ["gateway route resume build"]
    code, out, err = run("status", "nosuch", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown destination 'nosuch'; the rules name ")
    assert ", did you mean 'ci'?" in run("status", "cii")[2]
    write_waiting(destination="removed")
    assert run("status", "removed")[0] == 1, "the rules don't name it, and the log does"


def test_without_a_log_nothing_is_called_fine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: str) -> dict[str, Any]:  # a process that has nothing to tell
        return {}

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    for more in ((), ("ci",)):
        words = ("status", *more, "--admin", "127.0.0.1:1", "--log", "sqlite:///none.db")
        code, out, _ = run(*words)
        assert code == 1
        assert "nothing keeps" not in out
        (found,) = lines(run(*words, "--json")[1])
        assert (found["what"], found["why"].partition(": ")[0]) == ("the log", "not read")


@pytest.mark.usefixtures("log")
def test_status_is_not_fine_while_no_process_was_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("status")
    assert code == 3
    assert "nothing keeps" not in out
    code, out, _ = run("status", "--json")
    (told,) = lines(out)
    assert (code, told["what"], told["needs_attention"]) == (3, "processes", False)
    for kind in ("Retry-After", "halted", "refused rules", "partitions", "refused requests"):
        assert kind in told["why"]
    assert "gateway status --admin HOST:9090" in told["next"]
    code, out, _ = run("status", "ci", "--json")
    assert (code, [each["what"] for each in lines(out)]) == (3, ["processes"])
    run("route", "pause", "build")
    assert run("status")[0] == 1, "what is wrong comes first"
    run("route", "resume", "build", "--no-wait")

    answers: dict[str, dict[str, Any]] = {name: {"role": name} for name in ("ingress", "router", "all", "console")}

    async def answer(address: str) -> dict[str, Any]:
        return answers[address]

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    for role, unknown, known in (("ingress", "Retry-After", "refused req"), ("router", "refused req", "halted")):
        code, out, _ = run("status", "--admin", role, "--json")
        (told,) = [each for each in lines(out) if each["what"] == "processes"]
        assert unknown in told["why"]
        assert known not in told["why"]
    _, out, _ = run("status", "--admin", "console", "--json")
    (told,) = [each for each in lines(out) if each["what"] == "processes"]
    assert told["why"].startswith("no ingress or router was asked")
    assert "refused rules" not in told["why"]
    for asked in (("--admin", "all"), ("--admin", "ingress", "--admin", "router")):
        assert "processes" not in run("status", *asked)[1]


@pytest.mark.usefixtures("log")
def test_the_process_at_the_default_address_is_asked_if_it_has_this_log(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = {"destination": "ci", "why": "retry_after", "after": "429", "since": NOW, "until": NOW + 7200}
    names = [f"{Path('gateway.db').resolve()} gateway."]
    asked: list[str] = []

    async def answer(address: str, **_: float) -> dict[str, Any]:
        asked.append(address)
        return {"holds": [hold], "log_names": names}

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    code, out, _ = run("status", "--json")
    assert (code, [each["what"] for each in lines(out)], asked) == (1, ["destination ci"], ["127.0.0.1:1"])
    names[:] = ["/elsewhere/gateway.db gateway."]
    code, out, _ = run("status", "--json")
    (told,) = lines(out)
    assert (code, told["what"]) == (3, "processes")
    assert "the process at 127.0.0.1:1 may have another log" in told["why"]
    assert run("status", "--admin", "127.0.0.1:1")[0] == 1, "whoever names it knows which it is"


@pytest.mark.usefixtures("log")
def test_a_default_address_that_hangs_is_given_up_soon(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("gateway.commands.status.ADMIN", Address("127.0.0.1", server.getsockname()[1]))
        began = time.monotonic()
        code, out, _ = run("status", "--json")
        assert time.monotonic() - began < 5
    (told,) = lines(out)
    assert (code, told["what"]) == (3, "processes")
    assert "no gateway responds at 127.0.0.1:" in told["why"]
    assert "no response within 2 s" in told["why"]


@pytest.mark.usefixtures("log")
def test_a_process_that_is_down_is_reported_beside_the_log_and_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("route", "pause", "build")
    (port,) = free_ports(1)
    ask, dead = ask_status, f"127.0.0.1:{port}"

    async def answer(address: str) -> Mapping[str, Any]:
        hold = {"destination": "ci", "why": "breaker_open", "after": "503", "since": NOW, "until": NOW + 9}
        return {"holds": [hold]} if address == "alive:9090" else await ask(address)

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    monkeypatch.setenv("GATEWAY_ADMIN", dead)
    for words, known in (
        ((), ["route build"]),
        (("--admin", dead, "--admin", "alive:9090"), ["route build", "destination ci"]),
    ):
        code, out, _ = run("status", *words, "--json")
        gone, *others = lines(out)
        assert (code, gone["what"], gone["needs_attention"], [each["what"] for each in others]) == (
            1,
            dead,
            True,
            known,
        )
        assert gone["why"].startswith("no gateway responds: connection refused; ")
        assert gone["next"][0].startswith("# check that it is running")
    code, out, _ = run("status", "ci", "--json")
    assert (code, lines(out)[0]["what"]) == (1, dead)


@pytest.mark.usefixtures("log")
def test_a_process_of_another_version_hides_nothing_of_the_log_and_of_the_other_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("route", "pause", "build")
    hold = {"destination": "ci", "why": "breaker_open", "after": "503", "since": NOW, "until": NOW + 9}
    before = {"route": "mirror", "destination": "ci", "halted": 2.0, "blocked": 0.0}
    answers: dict[str, dict[str, Any]] = {
        "alive:9090": {"holds": [hold]},
        "older:9090": {"ordered": [before]},
        "newer:9090": {"version": "9.1", "ordered": [{"keys": []}], "rules": {"changed_at": "monday"}},
    }

    async def answer(address: str) -> dict[str, Any]:
        return answers[address]

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    code, out, _ = run("status", *[word for name in answers for word in ("--admin", name)], "--json")
    found = {each["what"]: each["why"] for each in lines(out)}
    assert code == 1
    assert found == {
        "newer:9090": "part of its status (version 9.1) can't be read here: ordered",
        "route build": "paused",
        "destination ci": "breaker open after 503",
        "mirror → ci": "keys halted",
    }


@pytest.mark.usefixtures("log")
def test_a_silent_source_is_reported_but_not_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: str) -> dict[str, Any]:  # a process that has nothing to tell
        return {}

    monkeypatch.setattr("gateway.ops.send.ask_status", answer)
    monkeypatch.setenv("GATEWAY_ADMIN", "alive:9090")
    for number in range(silent_sources.MIN_EVENTS + 1):
        write_event(f"evt_{number}")
    assert run("status", "--json")[:2] == (0, "")
    monkeypatch.setattr(silent_sources, "QUIET", 0.0)
    monkeypatch.setattr(silent_sources, "GAP_FACTOR", 1e-9)
    code, out, _ = run("status", "--json")
    (told,) = lines(out)
    assert (code, told["what"], told["needs_attention"]) == (0, "source github", False)
    assert told["since"] is not None
    assert "source github" not in run("status", "ci", "--json")[1]
    assert "source github" not in run("status", "--rules", "none.yaml", "--json")[1]
    monkeypatch.setattr(silent_sources, "MAX_SOURCES", 0)
    code, _, err = run("status")
    assert "silent sources weren't checked, as there are more than 0" in err


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize("address", ["ftp://a:1", "http://", "a:port", "a:99999"])
def test_an_admin_address_that_is_none_is_bad_usage(run: Run, address: str) -> None:
    code, out, err = run("status", "--admin", address)
    assert (code, out, err) == (2, "", f"error: --admin: expected HOST:PORT of a process, got {address!r}\n")


@pytest.mark.usefixtures("log")
def test_a_server_that_is_no_gateway_counts_as_unresponsive(run: Run, gate: str) -> None:
    code, out, _ = run("status", "--admin", gate, "--json")
    (told,) = lines(out)
    assert (code, told["what"]) == (1, gate)
    assert told["why"].startswith("no gateway responds: expected the status of a gateway, got HTTP 501; ")


@pytest.mark.usefixtures("log")
def test_events_of_an_unknown_source_are_reported_by_its_name(run: Run) -> None:
    write_waiting(source="gone", route="", destination="")
    found, _ = [each for each in lines(run("status", "--json")[1]) if "what" in each]
    assert (found["what"], found["why"]) == ("source gone", "events of a source that isn't in the rules")
    assert found["count"] == 1
    assert all(step.startswith("# ") for step in found["next"])


# ---- Real processes ----


def gateway(*words: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gateway", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def test_a_stream_that_is_closed_takes_nothing_and_breaks_nothing() -> None:
    words = (sys.executable, "-m", "gateway", "check", "--log", "sqlite:///gateway.db")
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, b"Traceback" in done.stderr + done.stdout) == (0, False)


def test_check_warns_of_an_address_to_which_no_request_will_be_made(run: Run) -> None:
    assert "egress_refused" not in run("check")[1]
    for url, kind in (
        ("http://169.254.169.254/latest", "169.254.169.254 is link-local"),
        ("http://2852039166/", "169.254.169.254 is link-local"),
        ("http://[fd00:ec2::254]/", "fd00:ec2::254 is cloud metadata"),
    ):
        Path("routes.yaml").write_text(RULES.replace("http://127.0.0.1:1/hook?token=abc", url))
        code, out, _ = run("check")
        assert code == 0
        assert (
            f"destinations.ci.url: expected an address that deliveries may reach; refused by egress policy: {kind}"
            in out
        )
        (told,) = [each for each in lines(run("check", "--json")[1]) if each["code"] == "egress"]
        assert (told["path"], told["severity"]) == ("destinations.ci.url", "warning")
    Path("routes.yaml").write_text(Path("routes.yaml").read_text() + "egress: {allow: ['fd00:ec2::254']}\n")
    assert "egress_refused" not in run("check")[1]


def test_a_reader_that_has_had_enough_is_no_failure_to_speak_of() -> None:
    process = gateway("schema")
    assert process.stdout is not None
    process.stdout.close()  # before anything is written: what it prints is longer than a pipe
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(20) == 1


def test_an_interrupt_ends_a_command_quietly(folder: Path) -> None:
    with interruptible():
        process = gateway("receive", "--port", "0", "--json", cwd=folder)
    assert process.stdout is not None
    listening = json.loads(process.stdout.readline())
    assert listening["event"] == "listening"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


_INTERRUPTED_AT_AN_IMPORT = """
import importlib.abc, os, runpy, signal, sys

class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

at, start, *words = sys.argv[1:]
sys.meta_path.insert(0, Interrupts())
sys.argv[1:] = words
if start == "module":
    runpy.run_module("gateway", run_name="__main__", alter_sys=True)
module, _, name = start.partition(":")
sys.exit(getattr(__import__(module, fromlist=[name]), name)())
"""
"""Start the command as a script or as a module, with a Ctrl-C once something is imported."""


@pytest.mark.parametrize("module", ["gateway.cli", "gateway.settings", "gateway.commands.status"])
@pytest.mark.parametrize("start", ["module", "script"])
def test_an_interrupt_while_a_command_is_imported_ends_it_quietly(start: str, module: str) -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["gateway"]
    words = (module, start if start == "module" else script, "status")
    with interruptible():
        done = subprocess.run(
            [sys.executable, "-c", _INTERRUPTED_AT_AN_IMPORT, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.usefixtures("log")
def test_an_interrupt_of_the_wait_leaves_a_replay_under_way(folder: Path) -> None:
    write_event("evt_1")
    with interruptible():
        process = gateway("replay", "--route", "build", "--from", "1h", "--json", cwd=folder)
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert f"`gateway replay --follow {told['replay']}` shows it" in err
    assert [(command.name, command.state) for command in stored()] == [(told["replay"], "requested")]


@pytest.mark.rotated(share=1 / 10, group="acceptance")
async def test_a_gateway_takes_an_event_and_ends_with_its_signal(folder: Path) -> None:
    """Run, send, deliver, replay, SIGTERM."""
    (port,) = free_ports(1)
    rules = RULES.replace("127.0.0.1:1/", f"127.0.0.1:{port}/")
    database = f"sqlite:///{folder / 'gateway.db'}"

    async def call(*words: str) -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            *words,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        out, _ = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode, out.decode()

    async with GatewayProcess(folder, rules=rules, log=database) as running:
        url = f"http://127.0.0.1:{running.port}"
        code, out = await call("send", "github", "push.json", "--url", url, "--type", "push", "--json")
        assert code == 0
        answer = json.loads(out)
        assert answer["status"] == 202
        code, out = await call("send", "github", "push.json", "--url", url, "--forge")
        assert code == 1
        assert out.startswith("401")
        code, out = await call("events", "list", "--json")
        assert [event["id"] for event in lines(out)] == [answer["event_id"]]
        code, out = await call("destination", "pause", "ci")
        assert code == 0
        code, out = await call("destination", "resume", "ci", "--json")
        assert code == 0
        assert json.loads(out)["state"] == "active"
        kicks = await asyncio.gather(*[call("destination", "kick", "ci", "--json") for _ in range(6)])
        assert [(code, json.loads(out)["state"]) for code, out in kicks] == [(0, "done")] * 6, "given at once"
        code, out = await call("dead", "replay", "--all", "--json")
        assert (code, json.loads(out)["count"]) == (0, 0)
        code, out = await call("replay", "--route", "build", "--from", "1h", "--json")
        assert (code, lines(out)[-1]["injected"]) == (0, 1)
        assert await running.stop() == 0
