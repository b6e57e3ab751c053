"""`gateway rejected`, as an operator calls it: on an embedded log, beside its owner or without one."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from gateway.cli import main
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import Topics
from gateway.ops.output import Output
from gateway.quarantine.records import Missing, RejectedRequest, encode_rejected, key_of
from gateway.verify.kept_proof import conceal
from gateway.verify.request import Request
from gateway.verify.schemes import build_verifier

TOPICS = Topics()
OLD, NEW = "the old secret of a sender", "the new secret of a sender"
SALT = b"0123456789abcdef"
RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["${SECRET}"]}, quarantine: true}
  crm: {verify: {scheme: bearer, secrets: ["${CRM}"]}, quarantine: true, id: body.id}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: [github, crm], to: ci}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name, value in (("COLUMNS", "220"), ("SECRET", NEW), ("CRM", NEW)):
        monkeypatch.setenv(name, value)
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level
    asyncio.run(_create())
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


async def _create() -> None:
    log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
    events = [TOPICS.events("github"), TOPICS.events("crm")]
    await log.create(TOPICS.specs(events, has_quarantine=True))
    await log.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["rejected", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refuse(
    source: str,
    number: int,
    *,
    secret: str = NEW,
    missing: Missing = Missing.NOTHING,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Keep a request as the ingress does."""
    scheme: dict[str, Any] = {"scheme": "github" if source == "github" else "bearer"}
    verifier = build_verifier({**scheme, "secrets": [secret]})
    body = b'{"id":"e%d"}' % number
    pairs = [*verifier.sign(body, now=time.time(), id=f"d{number}", type="push", headers={}), *(headers or {}).items()]
    sent = Request("POST", "/", "sig=s3cret", tuple([(name.encode(), value.encode()) for name, value in pairs]), body)
    kept = conceal(build_verifier({**scheme, "secrets": [OLD]}), sent, SALT)
    request = RejectedRequest(
        source=source,
        reason="bad_signature" if source == "github" else "bad_credentials",
        at=time.time(),
        address="203.0.113.7",
        method="POST",
        path=f"/in/{source}",
        query=kept.query,
        headers=kept.headers,
        body=body,
        size=10**6 if missing is Missing.BODY else len(body),
        missing=missing,
        salt=SALT,
        credentials=kept.credentials,
    )

    async def store() -> None:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=False)
        await log.append(TOPICS.rejected, key=key_of(source), value=body, headers=encode_rejected(request))
        await log.close()

    asyncio.run(store())


def test_requests_are_listed_by_source_and_reason_and_then_one_by_one(run: Run) -> None:
    for number in range(3):
        refuse("github", number)
    refuse("crm", 9, missing=Missing.BODY)
    code, out, err = run("list", "--limit", "2")
    assert code == 0
    assert "the newest 2 of 4; --limit shows more" in err
    first, second = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()][:2]
    assert first[:3] == ["3", "github", "bad_signature"]
    assert second[:3] == ["1", "crm", "bad_credentials"]
    assert "1 too large" in out
    assert "too large to keep whole" in out
    assert "0@3" in out
    assert "203.0.113.7" in out
    assert run("list", "nobody")[:2] == (0, "no open refused requests\n")
    fields = [json.loads(line) for line in run("list", "github", "--json")[1].splitlines()]
    assert (fields[0]["count"], fields[0]["reason"]) == (3, "bad_signature")
    assert [each["position"] for each in fields[1:]] == ["0@2", "0@1", "0@0"]


def test_a_request_is_shown_without_what_is_secret_in_it(run: Run) -> None:
    refuse("crm", 1, headers={"X-Api-Key": "k3y", "Cookie": "c00kie", "X-Team": "blue"})
    code, out, _ = run("show", "0@0")
    assert code == 0
    assert "POST /in/crm?sig=***" in out
    assert "X-Team: blue" in out
    assert "X-Api-Key: ***" in out
    assert '{"id":"e1"}' in out
    both = out + run("show", "0@0", "--json")[1]
    for secret in (NEW, "k3y", "c00kie", "s3cret"):
        assert secret not in both
    code, _, err = run("show", "0@7")
    assert code == 1
    assert "expected the position of a refused request" in err


def test_a_retry_admits_what_passes_and_says_exactly_what_became_of_the_rest(run: Run) -> None:
    for number in range(12):
        refuse("github", number)
    for number in range(20, 23):
        refuse("github", number, secret="forged by somebody")
    refuse("github", 30, missing=Missing.BODY)
    refuse("crm", 40)
    assert run("retry", "github", "--since", "2h", "--dry-run")[1] == (
        "12 would be admitted, 3 still refused (bad_signature), 1 too large to keep whole\n"
    )
    assert run("retry", "github", "--since", "2h")[:2] == (
        0,
        "12 admitted, 3 still refused (bad_signature), 1 too large to keep whole\n",
    )
    assert run("retry", "github")[1] == "3 still refused (bad_signature), 1 too large to keep whole\n"
    assert run("retry", "crm", "0@16")[1] == "1 admitted\n"
    assert run("drop", "--source", "github", "--yes")[1] == "4 dropped\n"
    code, out, _ = run("list", "--all", "--json")
    statuses = [json.loads(line).get("status") for line in out.splitlines()]
    assert (code, statuses.count("admitted"), statuses.count("dropped")) == (0, 13, 4)


def test_a_retry_needs_the_source_and_its_secrets(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("github", 1)
    assert "unknown source 'githup', did you mean 'github'?" in run("retry", "githup")[2]
    monkeypatch.delenv("CRM")
    assert run("retry", "github")[1] == "1 admitted\n"  # another source's don't matter
    monkeypatch.delenv("SECRET")
    code, _, err = run("retry", "github")
    assert code == 2
    assert "SECRET" in err


@pytest.mark.parametrize(
    "written",
    [
        '"${CRM:-known-to-all-who-read-the-rules}"',
        '{secret: "${CRM:-known-to-all-who-read-the-rules}", until: 2099-01-01}',
    ],
)
def test_a_retry_verifies_with_no_default_that_the_gateway_may_not_have(
    run: Run, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    """A default is in the rules: a forgery that the gateway has refused would be admitted."""
    limited = 'limits: {rate: "${RATE:-5/s}"}, quarantine: true, id'  # a default that verifies nothing
    Path("routes.yaml").write_text(RULES.replace('"${CRM}"', written).replace("quarantine: true, id", limited))
    refuse("crm", 1, secret="known-to-all-who-read-the-rules")
    refuse("github", 2)
    monkeypatch.delenv("CRM")
    code, _, err = run("retry", "crm")
    assert code == 2
    assert "the environment variable CRM isn't set: expected it as the gateway has it" in err
    assert run("retry", "github")[1] == "1 admitted\n"
    monkeypatch.setenv("CRM", NEW)
    assert run("retry", "crm")[1] == "1 still refused (bad_credentials)\n"


def test_drop_needs_to_be_told_which(run: Run) -> None:
    refuse("github", 1)
    code, _, err = run("drop")
    assert code == 2
    assert "expected positions, --source, --reason, --since, --until or --all" in err
    code, _, err = run("drop", "0@0")
    assert code == 2
    assert "expected --yes, since it can't ask; it would drop 1 refused request" in err
    assert run("drop", "0@0", "--yes", "--json")[0] == 0


def test_a_drop_is_about_what_was_counted_when_it_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse("github", 1)

    def confirm(_: Output, question: str) -> bool:
        assert question == "drop 1 refused request?"
        other = threading.Thread(target=refuse, args=("github", 2))
        other.start()
        other.join()
        return True

    monkeypatch.setattr(Output, "is_interactive", property(lambda _: True))
    monkeypatch.setattr(Output, "confirm", confirm)
    assert run("drop", "--source", "github")[:2] == (0, "1 dropped\n")
    assert [json.loads(line).get("position") for line in run("list", "--json")[1].splitlines()][1:] == ["0@1"]


def test_what_is_mistyped_drops_and_retries_nothing(run: Run) -> None:
    refuse("github", 1)
    refuse("crm", 2)
    for words, told in (
        (("drop", "nonsense", "--yes"), "expected PARTITION@OFFSET, such as 2@1041, got 'nonsense'"),
        (("show", "0@x"), "expected PARTITION@OFFSET"),
        (("retry", "github", "0@"), "expected PARTITION@OFFSET"),
        (("drop", "--reason", "bad_signture", "--yes"), "unknown reason 'bad_signture', did you mean 'bad_signature'?"),
        (("list", "--reason", "forged"), "unknown reason 'forged'"),
        (("drop", "0@0", "0@99999", "--yes"), "0@99999: expected positions of refused requests that this is about"),
        (("retry", "github", "0@1"), "0@1: expected positions of refused requests that this is about"),
    ):
        code, _, err = run(*words)
        assert (code, told in err) == (2, True), err
    assert run("list")[1].count("open") + run("list", "--json")[1].count('"open"') > 0
    code, out, err = run("drop", "0@0", "--yes")
    assert (code, out) == (0, "1 dropped\n")
    code, out, err = run("drop", "0@0", "0@1", "--yes")
    assert (code, out) == (0, "1 dropped\n")
    assert "0@0: dropped already" in err


def test_status_shows_what_the_quarantine_holds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.commands.status.ADMIN", "127.0.0.1:1")
    for number in range(3):
        refuse("github", number)
    main(["status", "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [finding] = [each for each in found if "quarantine" in each["why"]]
    assert (finding["what"], finding["count"], finding["needs_attention"]) == ("source github", 3, False)
    assert finding["next"][0] == "gateway rejected list github --reason bad_signature"
    assert finding["next"][-1] == "gateway rejected retry github"
