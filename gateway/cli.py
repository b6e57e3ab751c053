"""The commands: each is a function here; what it takes, does and prints stands in the modules of `ops`.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted.
"""

import argparse
import asyncio
import gc
import json
import logging
import math
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import uvloop
from rich.text import Text

from gateway.engine.control import Control, DeadFilter, Order, Selection
from gateway.engine.replay import Matched
from gateway.engine.undelivered import Fate, Undelivered, open_letters, sighted_of
from gateway.log.base import Log, Partition
from gateway.log.embedded.backup import back_up
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.embedded.restore import restore
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import (
    Event,
    GatewayError,
    LogUnavailableError,
    RefusedError,
    RulesError,
    UnreadableRecordError,
    UsageError,
)
from gateway.ops import arguments as takes
from gateway.ops.arguments import Parser
from gateway.ops.explain import explain, explain_event
from gateway.ops.history import Found, find_event, is_place, newest_first, original_of
from gateway.ops.identities import Seen, identities_of
from gateway.ops.letters import Groups, deliveries_of, find_letters, read_letters
from gateway.ops.migrate import migrate
from gateway.ops.orders import LAST_WORD, Orders, Placed
from gateway.ops.output import Output, rfc3339
from gateway.ops.receive import Received, Receiver
from gateway.ops.replays import Progress, Window, follow, until_elected, window_of, would_replay
from gateway.ops.send import Answer, Sender, ask_status, sample, sign, source_of
from gateway.ops.show import (
    count,
    event_cells,
    event_content,
    event_fields,
    explained_fields,
    group_cells,
    is_success,
    letter_cells,
    letter_content,
    letter_fields,
    print_answer,
    print_answers,
    print_event,
    print_explained,
    print_letter,
    print_source,
    print_status,
    replay_fields,
    source_fields,
    told_of_kick,
    told_of_parked,
    told_of_unread,
    topic_cells,
    topic_fields,
)
from gateway.ops.status import (
    NOT_READ,
    REFUSED,
    Backlog,
    Backlogs,
    Finding,
    LastAttempts,
    add_dead,
    dead_in,
    findings_in,
    findings_of,
    of_destination,
    parked_of,
    paused_in,
    ranked,
    unread_in,
    unrouted_in,
    waiting,
    without_log,
)
from gateway.ops.verification import verification_of
from gateway.rules.document import reason_of
from gateway.rules.edition import edition_of
from gateway.rules.expressions import View
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Route, Rules
from gateway.rules.schema import json_schema
from gateway.run import Gateway, cannot_listen, event_topics, open_log, specs_of
from gateway.settings import Address, EmbeddedTarget, KafkaTarget, Settings, from_sources, log_target
from gateway.telemetry import logs
from gateway.verify.keys import did_you_mean

SETTINGS = {
    "rules": ("FILE", "the rule file", "routes.yaml"),
    "log": ("URL", "sqlite:///FILE or kafka://HOST:PORT[,HOST:PORT]", "sqlite:///gateway.db"),
    "listen": ("HOST:PORT", "where senders post", "0.0.0.0:8080"),
    "admin": ("HOST:PORT", "where metrics and health are", "127.0.0.1:9090"),
    "role": ("ROLE", "all, ingress or router", "all"),
    "topic_prefix": ("PREFIX", "what the names of topics and groups begin with", "gateway."),
    "traces": ("URL", "an OTLP collector that traces are sent to, such as http://localhost:4318", "none"),
    "traces_ratio": ("SHARE", "how much is traced, from 0 to 1, where a sender leaves it to us", "1"),
    "kafka_security_protocol": ("PROTOCOL", "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL", "PLAINTEXT"),
    "kafka_sasl_mechanism": ("MECHANISM", "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER", "none"),
    "kafka_sasl_username": ("NAME", "the user; with OAUTHBEARER the client's id", "none"),
    "kafka_sasl_password_file": ("FILE", "its password; with OAUTHBEARER the client's secret", "none"),
    "kafka_oauth_token_url": ("URL", "where OAUTHBEARER fetches its tokens", "none"),
    "kafka_oauth_scope": ("SCOPE", "the scope that is asked for there", "none"),
    "kafka_oauth_audience": ("NAME", "the audience that is asked for there", "none"),
    "kafka_ssl_ca": ("FILE", "the authorities that are trusted, in PEM", "the system's"),
    "kafka_ssl_certificate": ("FILE", "the certificate that is shown to brokers, in PEM", "none"),
    "kafka_ssl_key": ("FILE", "its private key", "in the certificate's file"),
}
"""What it is called in the help, what it is, and its default; `settings.py` reads them."""
KAFKA = tuple([name for name in SETTINGS if name.startswith("kafka_")])
LOG = ("log", "topic_prefix", *KAFKA)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (`sys.argv` by default) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
        sys.stdout.flush()
    except SystemExit as end:  # argparse, and rich when nobody reads stdout any more
        return end.code if isinstance(end.code, int) else 1
    except BrokenPipeError:
        # The reader has had enough, as `head` has. What is still buffered must not fail at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _main(words: list[str]) -> int:
    if words in (["--version"], ["-V"]):
        sys.stdout.write(f"gateway {version('webhook-gateway')}\n")
        return 0
    command = COMMANDS.get(" ".join(words[:2])) or COMMANDS.get(" ".join(words[:1]))
    if command is None:
        return _overview(words)
    arguments = command.parser().parse_intermixed_args(words[len(command.name.split()) :])
    output = Output(json=arguments.json)
    try:
        result = command.run(Call(arguments, _settings(arguments), output))
        return asyncio.run(result) if isinstance(result, Coroutine) else result
    except (RulesError, UsageError) as error:
        output.fail(str(error))
        return 2
    except BrokenPipeError:
        raise
    except (GatewayError, OSError) as error:
        output.fail(str(error))
        return 1


@dataclass(frozen=True, slots=True)
class Call:
    """A command's arguments, and where it prints."""

    arguments: argparse.Namespace
    settings: Settings
    output: Output

    @property
    def topics(self) -> Topics:
        return Topics(self.settings.topic_prefix)


Run = Callable[[Call], int | Coroutine[Any, Any, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: how it is called, what it takes and does. `settings` are those of `Settings` that it reads."""

    name: str
    about: str
    example: str
    run: Run
    takes: Callable[[Parser], None]
    settings: tuple[str, ...]

    def parser(self) -> Parser:
        parser = Parser(
            prog=f"gateway {self.name}",
            description=f"{self.about[0].upper()}{self.about[1:]}.",
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.takes(parser)
        kafka = parser.add_argument_group("the connection to Kafka") if set(KAFKA) & set(self.settings) else parser
        for name in self.settings:
            metavar, about, default = SETTINGS[name]
            flag = "--" + name.replace("_", "-")
            place = kafka if name in KAFKA else parser
            place.add_argument(flag, metavar=metavar, help=f"{about} (GATEWAY_{name.upper()}; {default})")
        if self.name != "run":
            parser.add_argument("--json", action="store_true", help="one JSON object a line, for scripts")
        return parser


COMMANDS: dict[str, Command] = {}


def _command(
    name: str,
    *,
    about: str,
    example: str,
    takes: Callable[[Parser], None] = lambda _: None,
    settings: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Make a function a command."""

    def register(run: Run) -> Run:
        COMMANDS[name] = Command(name=name, about=about, example=example, run=run, takes=takes, settings=settings)
        return run

    return register


def _settings(arguments: argparse.Namespace) -> Settings:
    """Read what this command takes: a variable that is of no concern to it can't stop it."""
    names = [name for name in (*SETTINGS, "dev") if hasattr(arguments, name)]
    environ = {variable: os.environ.get(variable, "") for variable in [f"GATEWAY_{name.upper()}" for name in names]}
    return from_sources({name: getattr(arguments, name) for name in names}, environ)


def _overview(words: list[str]) -> int:
    """Print what there is to call: an answer to `--help`, and to anything else a failure."""
    output = Output(json=False)
    group = f"{words[0]} " if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    asked = words[1:] if group else words
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(group)}
    if asked and asked not in (["--help"], ["-h"], ["help"]):
        known = {name.removeprefix(group).partition(" ")[0] for name in shown}
        output.fail(f"unknown command {' '.join(words)!r}{did_you_mean(asked[0], known)}; `gateway --help` lists them")
        return 2
    output.say(("usage: ", "bold"), f"gateway {group or 'COMMAND '}…")
    output.say()
    output.table(["command", "what it does"], [(name, command.about) for name, command in shown.items()])
    output.say()
    output.say("`gateway COMMAND --help` shows what a command takes, with an example.")
    return 0 if asked else 2


# ---- Running and checking ----


@_command(
    "run",
    about="take events in and deliver them, until SIGTERM",
    example="gateway run --rules routes.yaml --log kafka://broker1:9092,broker2:9092",
    takes=takes.run_arguments,
    settings=tuple(SETTINGS),
)
def _run(call: Call) -> int:
    lines = logs.configure(json=not sys.stdout.isatty(), descriptor=1)
    gateway = Gateway(call.settings, logs.get_logger("gateway"))
    # An event makes some dozen objects that live for milliseconds. By default the collector looks through what is in
    # flight every 700 of them, and time and again through the modules: a tenth of the processor time of an event.
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)
    try:
        uvloop.run(gateway.run())
    finally:
        lines.close()
    return 0


@_command(
    "check",
    about="tell every problem of the rules, with its place",
    example="gateway check routes.yaml",
    takes=takes.check_arguments,
    settings=LOG,
)
async def _check(call: Call) -> int:
    path = _rule_file(call)
    rules, problems = check_rules(path, resolve=False)
    errors = [problem for problem in problems if problem.severity == "error"]
    for problem in problems:
        fields = asdict(problem)
        if call.output.json:
            call.output.line({key: fields[key] for key in CHECKED})
        style = "bold red" if problem.severity == "error" else "yellow"
        call.output.say((f"{problem.severity}: ", style), str(problem))
    warnings = len(problems) - len(errors)
    failures: Sequence[str] = ()
    if rules is not None and not errors and call.arguments.since is not None:
        warned, failures = await _check_identities(call, rules)
        warnings += warned
    if errors:
        call.output.say((f"{path}: {count(len(errors), 'error')}", "bold red"))
        return 2
    told = f", with {count(warnings, 'warning')}" if warnings else ""
    if rules is None:
        call.output.say(f"{path}: no error{told}; what hangs on an unresolved reference wasn't looked at")
        return 0
    specs_of(rules, call.topics)  # or one is for what is the gateway's own
    sizes = {"source": rules.sources, "destination": rules.destinations, "route": rules.routes}
    counted = ", ".join(count(len(found), what) for what, found in sizes.items())
    if failures:
        call.output.say((f"{path}: {counted}: {' and '.join(failures)}", "bold red"), told)
        return 1
    call.output.say(f"{path}: {counted}: ", ("fine", "bold green"), told)
    return 0


async def _check_identities(call: Call, rules: Rules) -> tuple[int, Sequence[str]]:
    """Tell how the identities of sources tell the events in the log apart.

    Return how many warnings that makes, and what is wrong with how many sources.
    """
    output = call.output
    async with _log(call) as log:
        since = log.now() - call.arguments.since
        with call.output.waiting("reading the log"):
            found = await identities_of(log, event_topics(rules, call.topics), since, rules.sources)
    _print_identities(output, found)
    warned = conflicts = unidentified = 0
    for name, seen in sorted(found.items()):
        conflict, absence, problem = seen.conflict(), seen.absence(), seen.problem()
        conflicts += bool(conflict)
        unidentified += seen.is_unidentified
        told = [(conflict, True), (absence, seen.is_unidentified), (problem, False)]
        for what, is_error in told:
            if not what:
                continue
            warned += not is_error
            severity = "error" if is_error else "warning"
            message = f"{what}; `gateway explain {name}` tells what identifies its events"
            if output.json:
                line = {"path": f"sources.{name}.id", "code": "identity", "severity": severity, "message": message}
                output.line(dict.fromkeys(CHECKED) | line)
            output.say((f"{severity}: ", "bold red" if is_error else "yellow"), f"sources.{name}.id: {message}")
    failures = []
    if conflicts:
        failures.append(f"the identities of {count(conflicts, 'source')} make different events equal")
    if unidentified:
        failures.append(f"the `id` of {count(unidentified, 'source')} is in none of the events")
    return warned, failures


def _print_identities(output: Output, found: Mapping[str, Seen]) -> None:
    rows: list[tuple[str, ...]] = []
    for name, seen in sorted(found.items()):
        types = seen.by_type()
        for each in types:
            if output.json:
                output.line({"source": name, **asdict(each)})
        rows += [(name, each.type, *[f"{number:,}" for number in astuple(each)[1:]]) for each in types[:MOST_TYPES]]
        if rest := types[MOST_TYPES:]:
            numbers = [sum(column) for column in zip(*[astuple(each)[1:] for each in rest], strict=True)]
            rows.append((name, f"({count(len(rest), 'other type')})", *[f"{number:,}" for number in numbers]))
    if rows:
        output.table(["source", "type", *COUNTED], rows, right=COUNTED)
        output.say()
    else:
        output.say("no events were appended then")


COUNTED = ("events", "copies", "conflicts", "without identity")
MOST_TYPES = 20
"""Of a source that are told one by one: a sender may make up as many as it likes."""
EVENT_ID = re.compile("evt_[0-9a-f]{32}")
CHECKED = ("file", "line", "column", "path", "code", "severity", "message")


@_command(
    "explain",
    about="tell which routes match an event, which don't and why, and the requests they would make",
    example="gateway explain routes.yaml --source github --header 'X-GitHub-Event: push' samples/github.push.json",
    takes=takes.explain_arguments,
    settings=LOG,
)
async def _explain(call: Call) -> int:
    arguments = call.arguments
    rules = _rules(_rule_file(call))
    is_secret_shown = arguments.show_secrets
    place = copy_of = ""
    if EVENT_ID.fullmatch(arguments.event) or is_place(arguments.event, event_topics(rules, call.topics)):
        async with _log(call) as log:
            found = await _event(call, log, event_topics(rules, call.topics), arguments.event)
            if found is None:
                return 1
            with call.output.waiting("looking for what it may be a copy of"):
                place, copy_of = found.place, await _copied(rules, log, found, decode_event(found.record))
        event = decode_event(found.record)
        explained = explain_event(rules, event, now=time.time(), is_secret_shown=is_secret_shown)
    elif arguments.source is None and arguments.event in rules.sources:
        source = rules.sources[arguments.event]
        routes = [route.name for route in rules.routes.values() if source.name in route.sources]
        if call.output.json:
            call.output.line(source_fields(source, verification_of(rules.files, source), routes))
        else:
            print_source(call.output, source, verification_of(rules.files, source), routes)
        return 0
    elif arguments.source is None:
        near = did_you_mean(arguments.event, rules.sources)
        raise UsageError(f"explain: expected --source beside a file, an event's id, or the name of a source{near}")
    else:
        body = _read(arguments.event)
        try:
            explained = explain(
                rules,
                source=arguments.source,
                headers=tuple([(os.fsencode(name), os.fsencode(value)) for name, value in arguments.header]),
                query="&".join(arguments.query),
                body=body,
                now=time.time(),
                is_secret_shown=is_secret_shown,
            )
        except RefusedError as error:
            call.output.fail(f"the ingress would answer {error.status} ({error.reason}): {error.detail}")
            return 1
    if call.output.json:
        call.output.line(explained_fields(explained, copy_of))
    else:
        print_explained(call.output, explained, place, copy_of)
    return 0


@_command(
    "schema",
    about="print the JSON Schema of routes.yaml, for editors",
    example="gateway schema > routes.schema.json",
)
def _schema(call: Call) -> int:
    indent = None if call.output.json else 2
    sys.stdout.write(json.dumps(json_schema(), indent=indent, ensure_ascii=False) + "\n")
    return 0


# ---- Sending and receiving ----


@_command(
    "send",
    about="send an event as its provider would, signed by the rules' own secrets",
    example="gateway send github --url http://127.0.0.1:8080 --type push samples/github.push.json",
    takes=takes.send_arguments,
    settings=("rules",),
)
async def _send(call: Call) -> int:
    arguments, output = call.arguments, call.output
    source, verifier = source_of(call.settings.rules, arguments.source, secret=arguments.secret)
    given = None if arguments.file is None else _read(arguments.file)
    answers: list[Answer] = []
    async with Sender() as sender:
        with output.progress("sending", arguments.count) as advance:
            for _ in range(arguments.count):
                identity = arguments.id or str(uuid.uuid4())
                request = sign(
                    source,
                    verifier,
                    url=arguments.url,
                    body=sample(identity, arguments.type) if given is None else given,
                    id=identity,
                    type=arguments.type,
                    headers=dict(arguments.header),
                    now=time.time(),
                    is_forged=arguments.forge,
                )
                try:
                    answer = await sender.send(request)
                except (OSError, TimeoutError) as error:
                    output.fail(f"{arguments.url}: expected an answer, got {str(error) or 'none in time'}")
                    return 1
                answers.append(answer)
                if output.json:
                    output.line({**asdict(answer), "seconds": round(answer.seconds, 6), "id": identity})
                elif arguments.count == 1:
                    print_answer(output, answer)
                advance()
    if arguments.count > 1:
        print_answers(output, answers)
    return 0 if all(is_success(answer.status) for answer in answers) else 1


@_command(
    "receive",
    about="be a destination that shows what it gets, verifies it, and fails on demand",
    example="gateway receive --port 9101 --respond 503,503,200 --delay 200ms --secret whsec_…",
    takes=takes.receive_arguments,
)
async def _receive(call: Call) -> int:
    arguments, output = call.arguments, call.output

    def report(received: Received) -> None:
        if output.json:
            sys.stdout.write(received.as_json() + "\n")
            sys.stdout.flush()
        else:
            output.say(received.as_text())

    receiver = Receiver(
        report=report,
        host=arguments.host,
        port=arguments.port,
        respond=arguments.respond,
        delay=arguments.delay,
        secrets=arguments.secret,
    )
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await receiver.start()
    except OSError as error:
        await receiver.close()
        raise cannot_listen("--host, --port:", Address(arguments.host, arguments.port), error) from error
    try:
        if output.json:
            output.line({"event": "listening", "url": receiver.url})
        else:
            output.note(f"receiving at {receiver.url}; Ctrl-C ends it")
        await stopping.wait()
    finally:
        await receiver.close()
    return 0


# ---- The log ----


@asynccontextmanager
async def _log(call: Call, *, may_create: bool = False) -> AsyncIterator[Log]:
    """Open the log beside a running gateway. With `may_create`, an embedded one that isn't there is made."""
    lines = logs.configure(json=False, level=logging.WARNING, descriptor=2)
    target = call.settings.log
    # A command is no owner, so that it can work beside the gateway that is.
    is_new = may_create and isinstance(target, EmbeddedTarget) and not target.path.exists()
    try:
        log = await open_log(call.settings, owner=is_new)
        try:
            yield log
        finally:
            await log.close()
    finally:
        lines.close()


@_command(
    "topics create",
    about="create the topics that are missing",
    example="gateway topics create --rules routes.yaml --log kafka://broker1:9092",
    settings=("rules", *LOG),
)
async def _topics_create(call: Call) -> int:
    specs = specs_of(_rules(call.settings.rules), call.topics)
    async with _log(call, may_create=True) as log:
        with call.output.waiting("creating topics"):
            created = set(await log.create(specs))
    if call.output.json:
        for spec in specs:
            call.output.line(topic_fields(spec) | {"created": spec.name in created})
    rows = [(*topic_cells(spec), "created" if spec.name in created else "was there") for spec in specs]
    call.output.table(["topic", "partitions", "retention", ""], rows, right=("partitions",))
    return 0


@_command(
    "topics check",
    about="compare the topics' real configuration with what the promises need",
    example="gateway topics check --log kafka://broker1:9092",
    settings=("rules", *LOG),
)
async def _topics_check(call: Call) -> int:
    specs = specs_of(_rules(call.settings.rules), call.topics)
    async with _log(call) as log:
        with call.output.waiting("reading the topics' configuration"):
            problems = await log.check(specs)
    is_fatal = any(problem.is_fatal for problem in problems)
    rows: list[tuple[str | Text, ...]] = []
    for spec in specs:
        own = [problem for problem in problems if problem.topic == spec.name]
        if call.output.json:
            found = [{"message": problem.message, "fatal": problem.is_fatal} for problem in own]
            call.output.line(topic_fields(spec) | {"ok": not own, "problems": found})
        told = Text("\n").join(
            [Text(logs.printable(problem.message), style="red" if problem.is_fatal else "yellow") for problem in own]
        )
        rows.append((*topic_cells(spec), told if own else Text("fine", style="green")))
    named = {spec.name for spec in specs}
    for problem in problems:
        if problem.topic not in named:
            call.output.note(f"{problem.topic}: {problem.message}", style="red" if problem.is_fatal else "yellow")
    call.output.table(["topic", "partitions", "retention", ""], rows, right=("partitions",))
    return 1 if is_fatal else 0


@_command(
    "events list",
    about="list the newest events in the log",
    example="gateway events list --source github --since 1h",
    takes=takes.events_arguments,
    settings=("rules", *LOG),
)
async def _events_list(call: Call) -> int:
    arguments, output = call.arguments, call.output
    topics = _event_topics(call, arguments.source)
    rows: list[tuple[str, ...]] = []
    async with _log(call) as log:
        since = None if arguments.since is None else log.now() - arguments.since
        with output.waiting("reading the log"):
            async with aclosing(newest_first(log, topics, since=since)) as history:
                async for found in history:
                    if len(rows) == arguments.limit:
                        break
                    event, problem = _event_of(found)
                    if event is not None and arguments.source not in (None, event.source):
                        continue
                    if output.json:
                        output.line(event_fields(found, event, problem))
                    rows.append(event_cells(found, event, problem))
    if rows:
        output.table(["received", "event", "source", "type", "key", "bytes"], rows, right=("bytes",))
    else:
        output.say("no events")
    return 0


@_command(
    "events show",
    about="show an event with its headers and body",
    example="gateway events show evt_9c1f…",
    takes=takes.event_arguments,
    settings=("rules", *LOG),
)
async def _events_show(call: Call) -> int:
    arguments, output = call.arguments, call.output
    found_events: list[tuple[Found, Event, str]] = []
    topics = _event_topics(call, arguments.source)
    try:
        rules = _rules(call.settings.rules)
    except RulesError:
        rules = None
    async with _log(call) as log:
        if is_place(arguments.id, topics):
            one = await _event(call, log, topics, arguments.id)
            if one is None:
                return 1
            history = _these([one])
        else:
            history = newest_first(log, topics)
        with output.waiting(f"looking for {arguments.id}"):
            async with aclosing(history):
                async for found in history:
                    event, _ = _event_of(found)
                    if event is not None and arguments.id in (event.id, found.place):
                        found_events.append((found, event, await _copied(rules, log, found, event)))
                        if not arguments.all:
                            break
    for found, event, copied in found_events:
        if output.json:
            more = {"copy_of": copied} if copied else {}
            output.line(event_fields(found, event, "") | more | event_content(event))
        else:
            print_event(output, event, found.place, copied)
    if not found_events:
        output.fail(_NEITHER.format(arguments.id))
    return 0 if found_events else 1


_NEITHER = "{}: expected the id of an event in the log, or its place, got neither"


async def _event(call: Call, log: Log, topics: Iterable[str], name: str) -> Found | None:
    """Return the event that an id or a place means; where there is none, say so, or that it can't be read."""
    try:
        with call.output.waiting(f"looking for {name}"):
            found = await find_event(log, topics, name)
    except UnreadableRecordError as error:
        call.output.fail(f"{name}: expected an event there, got a record that can't be read: {error}")
        return None
    if found is None:
        call.output.fail(_NEITHER.format(name))
    return found


async def _these(found: Sequence[Found]) -> AsyncGenerator[Found, None]:
    for each in found:
        yield each


async def _copied(rules: Rules | None, log: Log, found: Found, event: Event) -> str:
    """Return the place of the event of which one is a copy, by the rules at hand; "" if it isn't, or there are none."""
    source = None if rules is None else rules.sources.get(event.source)
    if source is None or source.dedupe is None:
        return ""
    original = await original_of(log, found, event, source.dedupe)
    return "" if original is None else original.place


def _event_topics(call: Call, source: str | None) -> list[str]:
    """Return where events are. Without readable rules, one source's topic can still be told by its name."""
    try:
        rules = _rules(call.settings.rules)
    except RulesError:
        if source is None:
            raise
        return [call.topics.events(source)]
    if source is not None and source not in rules.sources:
        raise UsageError(f"--source: unknown source {source!r}{did_you_mean(source, rules.sources)}")
    return sorted(
        event_topics(rules, call.topics)
        if source is None
        else event_topics(replace(rules, sources={source: rules.sources[source]}), call.topics)
    )


def _event_of(found: Found) -> tuple[Event | None, str]:
    try:
        return decode_event(found.record), ""
    except UnreadableRecordError as error:
        return None, str(error)


# ---- Dead letters ----


@_command(
    "dead list",
    about="list the open dead letters: by what they have in common, then one by one, newest first",
    example="gateway dead list --destination ci --since 1d",
    takes=takes.dead_list_arguments,
    settings=LOG,
)
async def _dead_list(call: Call) -> int:
    arguments, output = call.arguments, call.output
    groups = Groups()
    count_all = 0
    rows: list[tuple[str, ...]] = []
    async with _log(call) as log:
        control = await Orders(log, call.topics).control()
        which = _filter(arguments, now=log.now())
        with output.waiting("reading the dead letters"):
            async with aclosing(read_letters(log, call.topics, control, which, is_all=arguments.all)) as letters:
                async for letter in letters:
                    count_all += 1
                    if output.json:
                        if count_all > arguments.limit:
                            break
                        output.line(letter_fields(letter))
                        continue
                    groups.add(letter)
                    if count_all <= arguments.limit:
                        rows.append(letter_cells(letter))
    if count_all > arguments.limit:
        output.note(
            f"there are more; --limit shows more than {arguments.limit}"
            if output.json
            else f"the newest {arguments.limit:,} of {count_all:,}; --limit shows more"
        )
    if rows:
        columns = ["letters", "reason", "last result", "route → destination", "oldest", "newest"]
        output.table(columns, [group_cells(group) for group in groups.largest_first()], right=("letters",))
        output.say()
        columns = ["when", "route → destination, delivery, event", "reason", "tries", "last result"]
        if arguments.all:
            columns.append("status")
        output.table(columns, [row[: len(columns)] for row in rows], right=("tries",))
    else:
        output.say("no dead letters" if arguments.all else "no open dead letters")
    return 0


@_command(
    "dead show",
    about="show a dead letter with its attempts and its event",
    example="gateway dead show dlv_51aa…",
    takes=takes.dead_show_arguments,
    settings=LOG,
)
async def _dead_show(call: Call) -> int:
    output = call.output
    async with _log(call) as log:
        control = await Orders(log, call.topics).control()
        with output.waiting(f"looking for {call.arguments.id}"):
            letters = await find_letters(log, call.topics, control, call.arguments.id)
    for number, letter in enumerate(letters):
        if output.json:
            output.line(letter_fields(letter) | letter_content(letter))
        else:
            if number:
                output.say()
            print_letter(output, letter)
    if not letters:
        output.fail(f"{call.arguments.id}: expected the id of a dead letter's delivery or event, got none")
    return 0 if letters else 1


@_command(
    "dead replay",
    about="deliver dead letters again, with a schedule of attempts of their own",
    example="gateway dead replay --route announce-failed-payments --since 2h",
    takes=takes.settle_arguments,
    settings=LOG,
)
def _dead_replay(call: Call) -> Coroutine[Any, Any, int]:
    return _settle(call, "replay")


@_command(
    "dead drop",
    about="give dead letters up",
    example="gateway dead drop --reason route_removed --yes",
    takes=takes.drop_arguments,
    settings=LOG,
)
def _dead_drop(call: Call) -> Coroutine[Any, Any, int]:
    return _settle(call, "drop")


async def _settle(call: Call, action: Literal["replay", "drop"]) -> int:
    arguments, output = call.arguments, call.output
    which = _filter(arguments, now=0.0)
    if not arguments.ids and not arguments.all and which == DeadFilter():
        raise UsageError(f"dead {action}: expected ids, --route, --destination, --reason, --since, --until or --all")
    async with _log(call) as log:
        orders = Orders(log, call.topics)
        which = _filter(arguments, now=log.now())
        with output.waiting("reading the dead letters"):
            control = await orders.control()
            if arguments.ids:
                which = replace(which, ids=await deliveries_of(log, call.topics, control, arguments.ids))
            is_asked = action == "drop" and output.is_interactive and not arguments.yes and not output.json
            counts: Counter[tuple[str, str, str]] = Counter()
            if arguments.dry_run or is_asked:
                async for letter in read_letters(log, call.topics, control, which, is_all=False):
                    counts[letter.letter.route, letter.letter.destination, letter.letter.reason] += 1
        if arguments.dry_run:
            _print_dry_run(output, action, counts)
            return 0
        if is_asked and not output.confirm(f"drop {count(counts.total(), 'dead letter')}?"):
            output.say("nothing was dropped")
            return 1
        placed = await orders.settle(action, which)
        done = {"replay": f"queued {{}}: {DUE}", "drop": "dropped {}"}[action]
        return await _end_of(
            call, orders, placed, lambda ended: done.format(count(ended.count, "dead letter")) + _without(ended)
        )


def _print_dry_run(output: Output, action: str, counts: "Counter[tuple[str, str, str]]") -> None:
    if output.json:
        for (route, destination, reason), number in sorted(counts.items()):
            output.line({"route": route, "destination": destination, "reason": reason, "count": number})
        return
    rows = [(*which, str(number)) for which, number in sorted(counts.items())]
    if rows:
        output.table(["route", "destination", "reason", "dead letters"], rows, right=("dead letters",))
    output.say(f"would {action} {count(counts.total(), 'dead letter')}; nothing was done")


def _filter(arguments: argparse.Namespace, *, now: float) -> DeadFilter:
    """Return what the arguments ask for; their durations count back from `now`."""
    return DeadFilter(
        route=arguments.route,
        destination=arguments.destination,
        reason=arguments.reason,
        since=None if arguments.since is None else now - arguments.since,
        until=None if arguments.until is None else now - arguments.until,
    )


# ---- Replays ----

DUE = "due within 5 seconds, then at their destinations' own pace"
"""What becomes of deliveries that an order has queued."""
MOST_ROUTES = 100
"""Whose replays one command orders: each is a look at all events of the time."""


@_command(
    "replay",
    about="deliver events of a time again, by the rules in force now",
    example="gateway replay --route build-on-push --from 2h --to 30m --rate 100/s",
    takes=takes.replay_arguments,
    settings=("rules", *LOG),
)
async def _replay(call: Call) -> int:
    arguments = call.arguments
    if arguments.event is not None:
        return await _replay_event(call)
    if arguments.follow is None and arguments.cancel is None:
        return await _start_replay(call)
    async with _log(call) as log:
        if arguments.cancel is not None:
            return await _cancel_replay(call, Orders(log, call.topics), arguments.cancel)
        return await _follow_replay(call, log, arguments.follow)


async def _start_replay(call: Call) -> int:
    arguments, output = call.arguments, call.output
    if arguments.since is None or (arguments.route is None and not arguments.undelivered):
        raise UsageError(
            "replay: expected --route and --from, --from and --undelivered for every route, "
            "or --event, --follow or --cancel with an ID"
        )
    rules = _rules(call.settings.rules)
    routes = _replayed_routes(arguments, rules)
    async with _log(call) as log:
        now = _to_the_millisecond(log.now())
        until = None if arguments.until is None else arguments.until.on(now)
        asked = Selection(
            route="",
            destination=arguments.destination,
            source=arguments.source,
            since=arguments.since.on(now),
            until=now if until is None and arguments.dry_run else until,
            rate=arguments.rate,
            undelivered=arguments.undelivered,
        )
        if asked.since >= (log.now() if asked.until is None else asked.until):
            end = "--to" if asked.until is not None else "now"
            raise UsageError(f"--from: expected a time before {end}, got {rfc3339(asked.since)}")
        control = await Orders(log, call.topics).control()
        selected: list[tuple[Selection, Window]] = []
        await until_elected(log, event_topics(rules, call.topics))
        for route in routes:
            sources = route.sources if arguments.source is None else (arguments.source,)
            of_route = replace(rules, sources={name: rules.sources[name] for name in sources})
            window = await window_of(log, event_topics(of_route, call.topics), asked.since, asked.until)
            selection = replace(asked, route=route.name, starts=window.starts)
            if not arguments.undelivered:
                _propose_end(output, control, rules, selection, window)
            selected.append((selection, window))
        if arguments.dry_run:
            await _count_replays(call, log, rules, control, selected)
            return 0
        unread = {place: reason for _, window in selected for place, reason in window.unread.items()}
        begun = [(selection, window) for selection, window in selected if window.total]
        if not begun:
            return _nothing_to_replay(output, unread)
        ordered = [selection.route for selection, _ in begun if rules.routes[selection.route].order is not None]
        for name in ordered:
            output.note(f"route {name} keeps the order of its events, but a replay doesn't")
        if unread:
            output.note(f"{_told_of(unread)}: not included")
        orders = Orders(log, call.topics)
        placed = [
            (await orders.replay(selection, window.ends, unread=len(window.unread)), window.total)
            for selection, window in begun
        ]
        return max([await _await_replay(call, log, order, total) for order, total in placed])


def _nothing_to_replay(output: Output, unread: Mapping[str, str]) -> int:
    if unread:
        output.fail(f"expected events of that time, got none, but {_told_of(unread)}")
        return 1
    output.say("no events were appended then: there is nothing to do")
    if output.json:
        output.line({"replay": None, "state": "done", "scanned": 0, "total": 0, "injected": 0})
    return 0


def _told_of(unread: Mapping[str, str]) -> str:
    place, reason = next(iter(unread.items()))
    return f"{told_of_unread(len(unread))} ({place}: {reason})"


async def _await_replay(call: Call, log: Log, placed: Placed, total: int) -> int:
    """Show how far a replay is that was just ordered, if that is asked for."""
    if call.arguments.wait:
        return await _follow_replay(call, log, placed.order.name)
    selection = placed.order.selection
    by = f" of route {selection.route}" if selection is not None else ""
    call.output.say(f"replay {placed.order.name}{by} is stored; a running gateway carries it out")
    if call.output.json:
        call.output.line(replay_fields(Progress(placed.order, 0, total, 0)))
    return 0


def _replayed_routes(arguments: argparse.Namespace, rules: Rules) -> Sequence[Route]:
    """Return the routes that are meant: the one named, or all. Raises UsageError for a name that isn't there."""
    if arguments.route is not None:
        return [_replayed_route(arguments, rules)]
    if arguments.rate is not None:
        raise UsageError("--rate: expected --route beside it, since it is that of one route's replay, got none")
    for flag, name, known in (
        ("--destination", arguments.destination, rules.destinations),
        ("--source", arguments.source, rules.sources),
    ):
        if name is not None and name not in known:
            raise UsageError(f"{flag}: unknown {flag[2:]} {name!r}{did_you_mean(name, known)}")
    routes = [
        route
        for route in rules.routes.values()
        if arguments.source in (None, *route.sources) and arguments.destination in (None, *route.destinations)
    ]
    if not 0 < len(routes) <= MOST_ROUTES:
        got = f"{len(routes):,}" if routes else "none"
        raise UsageError(f"replay: expected at most {MOST_ROUTES} routes, got {got}; --route names one")
    return routes


def _replayed_route(arguments: argparse.Namespace, rules: Rules) -> Route:
    """Return the route that is named. Raises UsageError for a name that isn't there."""
    route = rules.routes.get(arguments.route)
    if route is None:
        raise UsageError(f"--route: unknown route {arguments.route!r}{did_you_mean(arguments.route, rules.routes)}")
    for flag, name, known in (
        ("--destination", arguments.destination, route.destinations),
        ("--source", arguments.source, route.sources),
    ):
        if name is not None and name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"{flag}: expected one of route {route.name} ({', '.join(known)}), got {name!r}{near}")
    return route


def _propose_end(output: Output, control: Control, rules: Rules, selection: Selection, window: Window) -> None:
    """Say from when on the route has taken events itself, where the replay is about later ones, too."""
    text = edition_of(rules).routes[selection.route]
    since = control.history.since(selection.route, text, window.ends)
    if since is not None and since > selection.since and (selection.until is None or since < selection.until):
        output.note(
            f"route {selection.route} has been as it is since {rfc3339(since)}, and what came later it has taken itself"
            f": --to {rfc3339(since)} or --undelivered leaves that out"
        )


async def _count_replays(
    call: Call, log: Log, rules: Rules, control: Control, selected: Sequence[tuple[Selection, Window]]
) -> None:
    """Say what replays would do, and how to have exactly that done."""
    output, queued = call.output, 0
    for selection, window in selected:
        dead = await open_letters(log, call.topics, control, selection, readable=log.readable)
        sighted = await sighted_of(log, call.topics, selection, window.ends, readable=log.readable)
        if missed := [*window.unread, *dead.unread, *sighted.unread]:
            output.note(f"{told_of_unread(len(missed))}: not counted")
        known = Undelivered(control, selection.route, dead, sighted=sighted, rules=lambda: rules)
        queued += await _count_replay(output, log, rules, selection, window, known=known)
    if len(selected) > 1:
        output.say(f"in all, would queue {count(queued, 'delivery')} by {count(len(selected), 'route')}")
    first, _ = selected[0]
    output.say(f"exactly these: {_command_of(first if call.arguments.route else replace(first, route=''))}")


async def _count_replay(
    output: Output, log: Log, rules: Rules, selection: Selection, window: Window, *, known: Undelivered
) -> int:
    """Count what a replay would do: events, and deliveries by what is known of them. Return how many it would queue."""
    counts: defaultdict[tuple[str, str], _Counted] = defaultdict(_Counted)
    failing = 0
    with output.gauge("reading", window.total) as show:
        async with aclosing(would_replay(log, rules, selection, window, known)) as looked:
            async for number, matched in looked:
                show(number, count(sum([each.count for each in counts.values()]), "event"))
                if matched is not None and matched.error is None:
                    counts[matched.event.source, matched.event.type].add(matched, selection)
                failing += matched is not None and matched.error is not None
    route = rules.routes[selection.route]
    to = route.destinations if selection.destination is None else (selection.destination,)
    total = _Counted(*[sum(numbers) for numbers in zip(*[astuple(each) for each in counts.values()], strict=True)])
    if output.json:
        for (source, type_), each in sorted(counts.items()):
            output.line({"route": route.name, "source": source, "type": type_, **asdict(each)})
        return total.deliveries
    output.say(("route ", "bold"), route.name)
    rows = [(*which, f"{each.count:,}") for which, each in sorted(counts.items()) if each.count]
    if rows:
        output.table(["source", "type", "events"], rows, right=("events",))
    if failing:
        output.note(f"for {count(failing, 'event')} the route's condition fails: each would be another dead letter")
    is_or_are = "is" if total.undelivered == 1 else "are"
    unknown = f", and of {total.unknown:,} that isn't known" if total.unknown else ""
    output.say(
        f"{count(total.matching, 'delivery')} {'matches' if total.matching == 1 else 'match'}; "
        f"{total.undelivered:,} {is_or_are} not delivered by what the log knows{unknown}"
    )
    deliveries, events = count(total.deliveries, "delivery"), count(total.count, "event")
    output.say(f"would queue {deliveries}: {events} to {', '.join(to)}; nothing was done")
    return total.deliveries


@dataclass(slots=True)
class _Counted:
    """Events that a replay would deliver, to how many destinations, and what of all that match isn't delivered."""

    count: int = 0
    deliveries: int = 0
    matching: int = 0
    undelivered: int = 0
    unknown: int = 0

    def add(self, matched: Matched, selection: Selection) -> None:
        chosen = matched.undelivered() if selection.undelivered else matched
        self.count += bool(chosen.destinations)
        self.deliveries += len(chosen.destinations)
        self.matching += len(matched.fates)
        self.undelivered += matched.fates.count(Fate.UNDELIVERED)
        self.unknown += matched.fates.count(Fate.UNKNOWN)


def _command_of(selection: Selection) -> str:
    """Return the command that replays a selection, whenever it is given; without a route that of every route."""
    words = ["gateway replay"]
    for flag, value in (
        ("--route", selection.route or None),
        ("--destination", selection.destination),
        ("--source", selection.source),
    ):
        words += [] if value is None else [flag, value]
    words += ["--from", rfc3339(selection.since)]
    words += [] if selection.until is None else ["--to", rfc3339(selection.until)]
    words += ["--undelivered"] if selection.undelivered else []
    return " ".join(words)


def _to_the_millisecond(at: float) -> float:
    """Return a time as commands print it, so that what is copied from their output means the same."""
    return math.floor(at * 1000) / 1000


async def _replay_event(call: Call) -> int:
    """Deliver one event of the log again."""
    arguments, output = call.arguments, call.output
    if arguments.since or arguments.until or arguments.source or arguments.undelivered:
        raise UsageError("replay: expected --route and --destination beside --event, if anything, got others")
    rules = _rules(call.settings.rules)
    async with _log(call) as log:
        found = await _event(call, log, event_topics(rules, call.topics), arguments.event)
        if found is None:
            return 1
        event = decode_event(found.record)
        routes = _routes_of(arguments, rules, event)
        for route in routes:
            to = route.destinations if arguments.destination is None else (arguments.destination,)
            if arguments.dry_run:
                what = f"{count(len(to), 'delivery')}: {event.id} by {route.name} to {', '.join(to)}"
                output.say(f"would queue {what}; nothing was done")
                if output.json:
                    output.line({"event": event.id, "route": route.name, "destinations": list(to)})
        if arguments.dry_run:
            return 0
        result = 0
        place = f"{found.partition.topic}/{found.partition.number}"
        for route in routes:
            starts, ends = {place: found.record.offset}, {place: found.record.offset + 1}
            selection = Selection(route=route.name, destination=arguments.destination, since=0.0, starts=starts)
            placed = await Orders(log, call.topics).replay(selection, ends)
            result |= await _await_replay(call, log, placed, 1)
        return result


def _routes_of(arguments: argparse.Namespace, rules: Rules, event: Event) -> list[Route]:
    """Return the routes by which an event is to be delivered again. Raises UsageError where there is none."""
    if arguments.route is not None:
        _replayed_route(arguments, rules)
    matched = [route for route, _ in rules.table.match(View.of(event))]
    routes = [
        route
        for route in matched
        if arguments.route in (None, route.name) and arguments.destination in (None, *route.destinations)
    ]
    if not routes:
        wanted = arguments.route or (f"a route to {arguments.destination}" if arguments.destination else "a route")
        got = ", ".join(route.name for route in matched) or "none"
        raise UsageError(f"{event.id}: expected {wanted} to match it, got {got}; `gateway explain {event.id}` says why")
    return routes


async def _follow_replay(call: Call, log: Log, name: str) -> int:
    output = call.output
    try:
        async with aclosing(follow(log, call.topics, name, timeout=call.arguments.timeout)) as steps:
            first = await anext(steps, None)
            if first is None:
                orders = (await Orders(log, call.topics).control()).orders.values()
                known = [order.name for order in orders if order.kind == "replay" and order.state == "asked"]
                under_way = f"; under way: {', '.join(known)}" if known else ""
                raise UsageError(f"--follow: expected the ID of a replay, got {name!r}{under_way}")
            began, last = time.monotonic(), first
            with output.gauge(f"replay {name}", first.total, begun=first.scanned) as show:

                def tell(progress: Progress) -> None:
                    if output.json:
                        output.line(replay_fields(progress))
                    rate = (progress.injected - first.injected) / max(1.0, time.monotonic() - began)
                    waits = f", {told_of_unread(progress.unread)}" if progress.unread else ""
                    show(progress.scanned, f"{count(progress.injected, 'delivery')} queued, {rate:,.0f}/s{waits}")

                tell(first)
                async for last in steps:
                    tell(last)
    except asyncio.CancelledError:
        output.note(f"replay {name} goes on; `gateway replay --follow {name}` shows it, --cancel {name} ends it")
        raise
    return _replay_ended(output, last)


def _replay_ended(output: Output, last: Progress) -> int:
    by = f" by {last.order.selection.route}" if last.order.selection is not None else ""
    told = f"{count(last.injected, 'delivery')}{by}, looking through {count(last.scanned, 'record')} of events"
    match last.order.state:
        case "done":
            output.say(f"queued {told}" + (f": {DUE}" if last.injected else "") + _without(last.order))
            return 0
        case "cancelled":
            because = f": {last.order.detail}" if last.order.detail else ""
            output.fail(f"replay {last.order.name} was cancelled after {told}{because}")
        case _ if last.unread:
            name, them = last.order.name, "it" if last.unread == 1 else "them"
            output.fail(
                f"queued {told} by now; {told_of_unread(last.unread)}: replay {name} isn't complete, and goes on with "
                f"{them} by itself; `gateway replay --follow {name}` shows it, --cancel {name} ends it"
            )
        case _:
            name = last.order.name
            output.fail(
                f"no gateway is at replay {name}: expected progress, got none; it is stored and goes on with one"
            )
    return 1


async def _cancel_replay(call: Call, orders: Orders, name: str) -> int:
    placed = await orders.cancel(name)
    if placed is None:
        raise UsageError(f"--cancel: expected the ID of a replay that hasn't ended, got {name!r}")
    done = None
    if call.arguments.wait:
        with call.output.waiting("the gateway comes to a stop with it"):
            done = await orders.finished(placed, timeout=min(call.arguments.timeout, LAST_WORD))
    order = done or placed.order
    told = count(order.count, "delivery")
    call.output.say(
        f"replay {name} is cancelled after {told}"
        if done
        else f"replay {name} is cancelled after {told} or some more: no gateway has told where it came to a stop"
    )
    if call.output.json:
        call.output.line({"replay": name, "state": order.state, "injected": order.count, "final": done is not None})
    return 0


# ---- Status ----


@_command(
    "status",
    about="show what keeps deliveries from going out, the worst first",
    example="gateway status --admin http://127.0.0.1:9090",
    takes=takes.status_arguments,
    settings=("rules", *LOG),
)
async def _status(call: Call) -> int:
    arguments, output = call.arguments, call.output
    found: list[Finding] = []
    attempts = LastAttempts(arguments.destination or "")
    backlogs = Backlogs()
    rules, _ = await asyncio.to_thread(check_rules, call.settings.rules, resolve=False)
    asked = arguments.asked or [address for address in (os.environ.get("GATEWAY_ADMIN"),) if address]
    answers = [(await ask_status(address), address) for address in asked]
    control = Control()
    try:
        async with _log(call) as log:
            with output.waiting("reading what waits"):
                control = await Orders(log, call.topics).control()
                unread: dict[Partition, str] = {}
                async for filed in waiting(log, call.topics, control, unread):
                    backlogs.add(filed)
                    attempts.add(filed)
                found += paused_in(control) + findings_of(backlogs, log.now(), rules)
                found += await unrouted_in(log, call.topics, unread)
                found += await dead_in(log, call.topics, control, [answer for answer, _ in answers], unread)
                if arguments.destination:
                    await add_dead(log, call.topics, control, attempts, unread)
                found += unread_in(unread)
    except (UsageError, LogUnavailableError) as error:
        if not asked:
            raise
        found.append(without_log(error))
    for answer, address in answers:
        found += findings_in(answer, address, control)
    if arguments.destination:
        found = _of_one(found, rules, backlogs, attempts)
    print_status(output, ranked(found), attempts.newest_first())
    if not asked:
        output.note("no process was asked (--admin) for its breakers, halted keys, refused rules and unrouted events")
    return 1 if any(each.is_wrong for each in found) else 0


def _of_one(
    found: Iterable[Finding], rules: Rules | None, backlogs: Iterable[Backlog], attempts: LastAttempts
) -> list[Finding]:
    """Return what concerns one destination. Raises UsageError where neither the rules nor anything found names it."""
    name = attempts.destination
    routes = {each.route for each in backlogs if each.destination == name}
    if rules is not None:
        routes |= {route.name for route in rules.routes.values() if name in route.destinations}
    chosen = of_destination(found, name, routes)
    is_found = attempts.newest_first() or any(each.rank not in (NOT_READ, REFUSED) for each in chosen)
    if rules is not None and name not in rules.destinations and not is_found:
        known = sorted(rules.destinations)
        more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
        near = did_you_mean(name, known)
        raise UsageError(f"unknown destination {name!r}{near}; the rules name {', '.join(known[:MOST_NAMES])}{more}")
    return chosen


MOST_NAMES = 20
"""Of destinations that an error names."""


# ---- Routes and destinations ----


def _steer(kind: str, action: str) -> Run:
    def run(call: Call) -> Coroutine[Any, Any, int]:
        if not call.arguments.force:
            _check_name(call, kind, call.arguments.name)
        return _order(call, f"{kind}/{call.arguments.name}", action)

    return run


for _kind, _name in (("route", "build-on-push"), ("destination", "ci")):
    for _action, _about in (
        ("pause", "stop the deliveries of a {}; they are parked until it is resumed"),
        ("resume", "let a paused {} go on, with what was parked meanwhile"),
        ("kick", "try now what waits for a retry of a {}"),
    ):
        _command(
            f"{_kind} {_action}",
            about=_about.format(_kind),
            example=f"gateway {_kind} {_action} {_name}",
            takes=takes.order_arguments,
            settings=("rules", *LOG),
        )(_steer(_kind, _action))


async def _order(call: Call, name: str, action: str) -> int:
    kind, _, called = name.partition("/")
    shown = f"{kind} {called}"
    async with _log(call) as log:
        orders = Orders(log, call.topics)
        if action == "pause":
            await orders.pause(name)
            call.output.say(f"{shown} is paused; its deliveries are parked until `gateway {kind} resume {called}`")
            if call.output.json:
                call.output.line({"name": name, "state": "paused"})
            return 0
        parked: dict[str, int] = {}
        unread: dict[Partition, str] = {}
        if action == "kick" and call.arguments.wait:
            parked |= await parked_of(log, call.topics, await orders.control(), name, unread)
        placed = await (orders.resume(name) if action == "resume" else orders.kick(name))
        if placed is None:
            call.output.say(f"{shown} isn't paused: there is nothing to do")
            if call.output.json:
                call.output.line({"name": name, "state": "active", "count": 0})
            return 0
        left = told_of_parked(shown, parked, len(unread))
        return await _end_of(call, orders, placed, lambda done: _steered(shown, action, done, left), parked)


def _steered(shown: str, action: str, done: Order, parked: tuple[str, str]) -> str:
    """Tell what came of a resumption or a kick, and what the latter left parked, as `told_of_parked` has it."""
    does = "goes on" if action == "resume" else "is tried"
    ordered = f"; what waits on ordered routes ({done.detail}) {does}, too, and isn't counted" if done.detail else ""
    if done.state == "cancelled":
        return f"{shown} was paused again: {count(done.count, 'delivery')} had been let go on"
    if action == "resume":
        follows = f"; {told_of_unread(done.unread)}: what is parked there goes on once it can" if done.unread else ""
        return f"resumed {shown}: {count(done.count, 'delivery', 'goes')} on{ordered}{follows}"
    kind, _, name = shown.partition(" ")
    more = f"\n  gateway status {name}" if done.got and kind == "destination" else ""
    told, commands = parked
    return f"kicked {shown}: {told_of_kick(done, told)}{ordered}{_without(done)}{more}{commands}"


def _without(done: Order) -> str:
    return f"; {told_of_unread(done.unread)}: not included" if done.unread else ""


async def _end_of(
    call: Call, orders: Orders, placed: Placed, tell: Callable[[Order], str], parked: Mapping[str, int] | None = None
) -> int:
    """Wait, if that is asked for, until an order was carried out, and say what came of it.

    `parked` is what it leaves where it is, as in `parked_of`.
    """
    arguments, output = call.arguments, call.output
    done = None
    if arguments.wait:
        with output.waiting("the gateway is at it"):
            done = await orders.finished(placed, timeout=arguments.timeout)
    order = done or placed.order
    if output.json:
        uncounted = order.detail.split(", ") if done and order.detail else []
        told: dict[str, object] = {"order": order.key, "state": order.state, "count": order.count if done else None}
        if done and done.tried is not None:
            told |= {
                "tried": done.tried,
                "delivered": done.delivered,
                "waiting": dict(done.waits),
                "got": dict(done.got),
                "again": dict(done.again),
            }
        if done and parked:
            told["parked"] = parked
        if done and done.unread:
            told["unread_partitions"] = done.unread
        output.line(told | ({"uncounted_routes": uncounted} if uncounted else {}))
    elif done:
        for line in tell(done).splitlines():
            output.say(line)
    else:
        output.say("the order is stored; a running gateway carries it out")
    return 0 if (done and done.state != "cancelled") or not arguments.wait else 1


def _check_name(call: Call, kind: str, name: str) -> None:
    rules, _ = check_rules(call.settings.rules, resolve=False)
    if rules is None:
        call.output.note(f"{call.settings.rules} can't be read, so it isn't known whether there is a {kind} {name!r}")
        return
    known: Mapping[str, object] = rules.routes if kind == "route" else rules.destinations
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}{did_you_mean(name, known)}; --force does it all the same")


# ---- Moving and keeping the embedded log ----


@_command(
    "migrate",
    about="move an embedded log to Kafka, with what is undone and what is done; both stand still meanwhile",
    example="gateway migrate --from sqlite:///gateway.db --to kafka://broker1:9092",
    takes=takes.migrate_arguments,
    settings=("rules", "topic_prefix", *KAFKA),
)
async def _migrate(call: Call) -> int:
    output = call.output
    origin = log_target(call.arguments.source)
    if not isinstance(origin, EmbeddedTarget) or not isinstance(call.settings.log, KafkaTarget):
        raise UsageError("migrate: expected --from sqlite:///FILE and --to kafka://HOST:PORT, got others")
    if not origin.path.exists():
        raise UsageError(f"--from: expected an embedded log, got no file {origin.path}")
    rules = _rules(call.settings.rules)
    names = event_topics(rules, call.topics)
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(_log(call))
        # As its owner: a gateway that is at work on it is told of, and none can start meanwhile. What retention would
        # delete stays, for the way back.
        source = await EmbeddedLog.open(origin.path, owner=True, sweep_interval=None)
        stack.push_async_callback(source.close)

        def show(total: int) -> Callable[[int, str], None]:
            return stack.enter_context(output.gauge("migrate", total))

        moved, left = await migrate(source, target, call.topics, names, show, ordered=rules.ordered)
    if output.json:
        for each in moved:
            output.line(each._asdict())
    rows = [(each.topic, str(each.records), str(each.undone)) for each in moved if each.records]
    output.table(["topic", "records", "undone"], rows, right=("records", "undone"))
    if left:
        output.note(f"left behind, since they aren't of the prefix {call.topics.prefix!r}: {', '.join(left)}")
    twice = sum([each.twice for each in moved])
    told = f", but {count(twice, 'record')} twice, whose delivery may be repeated" if twice else ""
    output.say(
        f"everything is there, as it was{told}; start the gateway on Kafka, and keep the file until you have seen it "
        "work"
    )
    return 0


@_command(
    "backup",
    about="copy an embedded log as it is at this moment, beside a running gateway",
    example="gateway backup --log sqlite:///gateway.db /backup/gateway.db",
    takes=takes.backup_arguments,
    settings=("log",),
)
def _backup(call: Call) -> int:
    target, copy = call.settings.log, Path(call.arguments.file)
    if not isinstance(target, EmbeddedTarget):
        raise UsageError("--log: expected sqlite:///FILE, got Kafka, whose copies are its replicas")
    with call.output.waiting(f"copying {target.path}"):
        size = back_up(target.path, copy)
    call.output.say(f"{copy}: {size / 1e6:,.1f} MB")
    if call.output.json:
        call.output.line({"file": str(copy), "bytes": size})
    return 0


@_command(
    "restore",
    about="put a copy in the place of an embedded log, while no gateway runs; what was there is moved aside",
    example="gateway restore --log sqlite:///gateway.db /backup/gateway.db",
    takes=takes.restore_arguments,
    settings=("log",),
)
def _restore(call: Call) -> int:
    target, copy = call.settings.log, Path(call.arguments.file)
    if not isinstance(target, EmbeddedTarget):
        raise UsageError("--log: expected sqlite:///FILE, got Kafka, whose copies are its replicas")
    with call.output.waiting(f"restoring {target.path}"):
        size, before = restore(target.path, copy)
    aside = f"; what was there is {before}" if before else ""
    call.output.say(f"{target.path}: {size / 1e6:,.1f} MB, whole{aside}. Start the gateway")
    if call.output.json:
        call.output.line({"file": str(target.path), "bytes": size, "before": None if before is None else str(before)})
    return 0


# ---- What the commands share ----


def _rule_file(call: Call) -> Path:
    return Path(call.arguments.file) if call.arguments.file else call.settings.rules


def _rules(path: Path) -> Rules:
    """Read rules for a command that needs no secrets: something stands in for what can't be resolved."""
    return load_rules(path, resolve=False)


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: expected a file, got: {reason_of(error)}") from error
