"""What is told of stored commands, when the log fails, or somebody ends the CLI command, before they are done.

ends                                       what is told
─────────────────────────────────────────  ──────────────────────────────────────────────────────
while it waits for the outcome             the command, that it is carried out, what shows the outcome
while it stores the second of three        the first, and that the second isn't done
without an answer to the append itself     that the command may be stored
by Ctrl-C or SIGTERM                       the same as by an error
while the API is asked, or right after it  the same as of the log
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from typing_extensions import override

from gateway.cli import main
from gateway.commands.stored_commands import naming_stored, to_its_end
from gateway.engine.control.records import ControlRecord, decode
from gateway.log.audit_records import ActOutcome, AuditRecord
from gateway.log.base import Partition, Position, RecordHeaders
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import ForbiddenError, LogUnavailableError
from gateway.ops import redeliveries, replays
from gateway.ops.audit import Auditor
from gateway.ops.control_client import ControlClient
from gateway.ops.output import Output
from tests.builders import an_event
from tests.interruptible import interruptible
from tests.memory_log import MemoryLog

ROOT = Path(__file__).parent.parent.parent
TOPICS = Topics()
SOURCE_TOPIC = TOPICS.events("github")
RULES = """
version: 1
sources:
  github: {verify: {scheme: github, secrets: [sssssssssssssssss]}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: one, from: github, to: ci}
  - {name: two, from: github, to: ci}
  - {name: three, from: github, to: ci}
"""
Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GATEWAY_")]:
        monkeypatch.delenv(name)
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level

    async def fill() -> None:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
        await log.create(TOPICS.specs([SOURCE_TOPIC]))
        event = an_event(id="evt_1", source="github")
        await log.append(SOURCE_TOPIC, key=event_key(event), value=event.body, headers=encode_event(event))
        await log.close()

    asyncio.run(fill())
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call a command; return its exit code and stderr."""

    def call(*words: str) -> tuple[int, str]:
        code = main(words)
        return code, capsys.readouterr().err

    return call


def stored() -> list[ControlRecord]:
    async def read() -> list[ControlRecord]:
        log = await EmbeddedLog.open(Path("gateway.db"), owner=False)
        scan = log.scan(Partition(TOPICS.control, 0), 0, 1000)
        found = [decode(record.key, record.value) async for records in scan for record in records]
        await log.close()
        return found

    return asyncio.run(read())


async def no_answer(*_: object, **__: object) -> None:
    raise LogUnavailableError("expected an answer, got none")


@pytest.fixture
def nothing_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log fail once a command is stored."""
    for module in (replays, redeliveries):
        monkeypatch.setattr(module, "catch_up", no_answer)
    monkeypatch.setattr(ControlClient, "finished", no_answer)
    monkeypatch.setattr(ControlClient, "confirmed", no_answer)


@pytest.mark.usefixtures("nothing_comes_of_it")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("replay --route one --from 1h", ("replay {} is stored, and is carried out all the same; "
         "`gateway replay --follow {}` shows its progress, --cancel {} ends it")),
        ("replay --event evt_1 --route one", "replay {} is stored, and is carried out all the same; "),
        ("events redeliver evt_1", ("redelivery {} is stored, and is carried out all the same; "
         "`gateway events redeliver --follow {}` shows its result, --cancel {} ends it")),
        ("dead drop --all --yes", "the drop of dead letters (dead/{}) is stored, and is carried out all the same; "),
        ("dead replay --all", "the replay of dead letters (dead/{}) is stored, and is carried out all the same; "),
        ("destination kick ci", ("the kick of destination ci is stored, and is carried out all the same; "
         "`gateway status ci` shows what came of it")),
        ("route pause one", "the pause of route one is stored, and is carried out all the same; "),
    ],
)  # fmt: skip
def test_an_error_while_it_waits_names_what_is_stored(run: Run, words: str, told: str) -> None:
    code, err = run(*words.split())
    (command,) = stored()
    assert code == 1
    assert err.startswith("error: expected an answer, got none\n")
    assert told.replace("{}", command.name) in err


@pytest.mark.usefixtures("nothing_comes_of_it")
@pytest.mark.parametrize(("words", "count"), [("replay --undelivered --from 1h", 3), ("replay --event evt_1", 3)])
def test_all_replays_of_a_command_are_stored_and_named(run: Run, words: str, count: int) -> None:
    code, err = run(*words.split())
    names = [command.name for command in stored()]
    assert (code, len(names)) == (1, count)
    assert [name for name in names if f"replay {name} is stored" in err] == names


@pytest.mark.parametrize("words", ["replay --undelivered --from 1h", "replay --event evt_1"])
def test_what_was_stored_is_named_when_a_later_one_cant_be(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    begin, begun = Auditor._append, list[str]()

    async def append(auditor: Auditor, act: AuditRecord) -> None:
        if act.outcome is ActOutcome.BEGUN:
            begun.append(act.what)
            if len(begun) == 2:
                await no_answer()
        await begin(auditor, act)

    monkeypatch.setattr(Auditor, "_append", append)
    code, err = run(*words.split())
    (command,) = stored()
    assert code == 1
    first, second = err.splitlines()
    assert first.startswith("error: replay --")
    assert "--route two" in first
    assert ": not done, as it can't be recorded who does it: expected an answer, got none" in first
    assert second.startswith(f"error: replay {command.name} is stored")


class UnansweredLog(MemoryLog):
    """Stores control records, and doesn't say so."""

    error: type[LogUnavailableError] = LogUnavailableError

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        if topic == TOPICS.control:
            raise self.error("expected an answer, got none")
        return position


async def test_a_command_without_an_answer_may_be_stored() -> None:
    log = UnansweredLog()
    await log.create(TOPICS.specs([]))
    with pytest.raises(LogUnavailableError, match="got none; perhaps kick/route/one is stored all the same"):
        await ControlClient(log, TOPICS).kick("route/one")
    log.error = ForbiddenError
    with pytest.raises(ForbiddenError, match=r"got none$"):
        await ControlClient(log, TOPICS).kick("route/one")


async def test_who_ends_it_while_a_command_is_stored_waits_for_that_and_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun, answer = asyncio.Event(), asyncio.Event()

    async def placing() -> str:
        begun.set()
        await answer.wait()
        return "18c2"

    async def another() -> str:
        raise AssertionError("nothing more is commanded")

    async def command() -> None:
        output = Output(json=False)
        with naming_stored(output) as stored:
            stored.add_replay(await to_its_end(output, placing()))
            stored.add_replay(await to_its_end(output, another()))

    task = asyncio.create_task(command())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    answer.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "replay 18c2 is stored, and is carried out all the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "number", "code", "told"),
    [
        ("dead drop --all --yes --json", signal.SIGINT, 130, ["the drop of dead letters (dead/{}) is stored"]),
        ("destination kick ci --json", signal.SIGTERM, 143, ["the kick of destination ci is stored"]),
        ("replay --undelivered --from 1h --json", signal.SIGTERM, 143, ["replay {} is stored"] * 3),
    ],
)
def test_who_ends_the_wait_is_told_what_is_stored(
    words: str, number: signal.Signals, code: int, told: list[str]
) -> None:
    with interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", *words.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    while len(stored()) < len(told):
        assert process.poll() is None
    process.send_signal(number)  # perhaps before the command knows that the last one is stored
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, out + err
    assert [json.loads(line)["state"] for line in out.splitlines()] in ([], ["requested"])
    for command, text in zip(stored(), told, strict=True):
        assert text.format(command.name) in err


REDELIVER = ("events", "redeliver", "evt_1")
STORED = (
    "redelivery 18c2 is stored, and is carried out all the same; `gateway events redeliver --follow 18c2` shows its "
    "result, --cancel 18c2 ends it\n"
)


class SlowApi:
    """Stores a command, and says so when it is told to; who asks what has come of it gets no answer, or an error."""

    def __init__(self, *, is_away: bool = False, command: str = "redeliver/18c2") -> None:
        self.command = command
        self.asked, self.answer, self.followed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_away = is_away

    async def serve(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            self.asked.set()
            await self.answer.wait()
            command = {"id": self.command, "at": "2026-12-01T06:00:00.000Z", "by": "ada", "is_new": True}
            return web.json_response({**command, "state": "requested"}, status=202)
        self.followed.set()
        if not self._is_away:
            await asyncio.Event().wait()
        return web.json_response({"code": "busy", "detail": "too many"}, status=503)


async def commanded_by(api: SlowApi, *words: str, end: Callable[[asyncio.subprocess.Process], Any]) -> tuple[int, str]:
    """Run a command by an API, and return its exit code and stderr; `end` ends it meanwhile."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", api.serve)
    async with TestServer(application) as server:
        with interruptible():
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", *words, "--api", str(server.make_url("/"))),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        await end(process)
        _, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, err.decode()


@pytest.mark.parametrize("words", [(), ("--no-wait", "--json")])
async def test_who_ends_it_while_the_api_is_asked_is_told_what_is_stored(words: tuple[str, ...]) -> None:
    api = SlowApi()

    async def while_it_stores(process: asyncio.subprocess.Process) -> None:
        await api.asked.wait()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert b"waiting until it is known whether the command is stored" in await process.stderr.readline()
        api.answer.set()

    assert await commanded_by(api, *REDELIVER, *words, end=while_it_stores) == (130, STORED)


@pytest.mark.parametrize("words", [(), ("--no-wait", "--json")])
async def test_who_ends_it_right_after_the_api_has_stored_it_is_told(words: tuple[str, ...]) -> None:
    api = SlowApi()
    api.answer.set()

    async def once_it_is_stored(process: asyncio.subprocess.Process) -> None:
        await api.followed.wait()
        process.send_signal(signal.SIGINT)

    assert await commanded_by(api, *REDELIVER, *words, end=once_it_is_stored) == (130, STORED)


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("redeliver/18c2", (*REDELIVER, "--no-wait", "--json"), STORED),
        (
            "kick/route/one",
            ("route", "kick", "one", "--force", "--timeout", "1ms"),
            (
                "the kick of route one is stored, and is carried out all the same; "
                "`gateway status` shows what came of it\n"
            ),
        ),
    ],
)
async def test_an_api_that_fails_once_it_has_stored_a_command_leaves_it_named_once(
    command: str, words: tuple[str, ...], told: str
) -> None:
    api = SlowApi(is_away=True, command=command)
    api.answer.set()

    async def not_at_all(_: asyncio.subprocess.Process) -> None:
        pass

    code, err = await commanded_by(api, *words, end=not_at_all)
    failed, named = err.splitlines(keepends=True)
    assert (code, failed.endswith("503: too many\n"), named) == (1, True, f"error: {told}")


class ForgetfulApi(SlowApi):
    """Knows nothing of what it has just stored, as if the control topic was recreated in between."""

    @override
    async def serve(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            return await super().serve(request)
        if request.path.endswith("/me"):
            return web.json_response({})
        if request.path.endswith("/routes/one"):
            return web.json_response({"name": "one", "order": None})
        return web.json_response({"code": "not_found", "detail": "none of that name"}, status=404)


@pytest.mark.parametrize("wait", ["--wait", "--no-wait"])
async def test_a_replay_that_the_api_knows_nothing_of_once_it_is_stored_is_no_success(wait: str) -> None:
    api = ForgetfulApi(command="replay/18c2")
    api.answer.set()

    async def not_at_all(_: asyncio.subprocess.Process) -> None:
        pass

    code, err = await commanded_by(api, "replay", "--route", "one", "--from", "1h", wait, end=not_at_all)
    assert (code, err) == (
        1,
        "error: replay 18c2 was stored, and isn't in the log any more: was its control topic deleted?\n",
    )
