"""What a command is, and what several commands share."""

import argparse
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gateway.commands.values import Parser, duration
from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.open_log import open_log
from gateway.ops.output import Output
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Rules
from gateway.rules.yaml_document import Problem, reason_of
from gateway.settings import EmbeddedTarget, Settings
from gateway.telemetry import logs
from gateway.text import did_you_mean

SETTINGS = {
    "rules": ("FILE", "the rule file", "routes.yaml"),
    "log": ("URL", "sqlite:///FILE or kafka://HOST:PORT[,HOST:PORT]", "sqlite:///gateway.db"),
    "listen": ("HOST:PORT", "the address that senders post to", "0.0.0.0:8080"),
    "admin": ("HOST:PORT", "the address of metrics, health and status", "127.0.0.1:9090"),
    "tls_certificate": ("FILE[,FILE]", "the ingress's certificates, in PEM; with them it serves HTTPS", "none"),
    "tls_key": ("FILE[,FILE]", "their private keys", "in the certificates' files"),
    "proxy_protocol": ("NETWORK[,NETWORK]", "networks that send a PROXY v2 header; no others can connect", "none"),
    "role": ("ROLE", "all (ingress and router), ingress, router, or console (search index, API and pages)", "all"),
    "processes": ("NUMBER", "how many processes share the work, one for each core; with Kafka alone", "1"),
    "topic_prefix": ("PREFIX", "prefix of the names of topics and groups", "gateway."),
    "attempts": ("WHICH", "which attempts of deliveries are recorded: failures, all or off", "failures"),
    "traces": ("URL", "the OTLP collector to send traces to, such as http://localhost:4318", "none"),
    "traces_ratio": ("RATIO", "fraction of requests to trace, from 0 to 1, if the sender hasn't decided", "1"),
    "index": ("FILE", "the search index; role console keeps it, and role all if this is set", "index.db"),
    "index_days": ("DAYS", "days of events to keep in the index", "7"),
    "index_bytes": ("SIZE", "approximate maximum size of the index's file", "8GiB"),
    "spool": (
        "URL",
        "sqlite:///FILE, stores events while the log accepts none",
        "none: senders get 503 then",
    ),
    "spool_bytes": ("SIZE", "maximum size of the events in it", "4GiB"),
    "spool_days": ("DAYS", "maximum age of a topic's oldest event in it, beyond which it takes no others there", "1"),
    "access": ("FILE", "the access file: who may use the admin address", "none: anyone on this machine"),
    "identity_header": ("NAME", "the header in which a trusted proxy names the signed-in user", "none"),
    "identity_proxies": ("NETWORK[,NETWORK]", "the addresses of these proxies", "none"),
    "public_url": (
        "URL",
        "where senders reach the ingress, such as https://hooks.example.com, for pages to show",
        "none",
    ),
    "kafka_security_protocol": ("PROTOCOL", "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL", "PLAINTEXT"),
    "kafka_sasl_mechanism": ("MECHANISM", "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER", "none"),
    "kafka_sasl_username": ("NAME", "the user; with OAUTHBEARER the client's id", "none"),
    "kafka_sasl_password_file": ("FILE", "its password; with OAUTHBEARER the client's secret", "none"),
    "kafka_oauth_token_url": ("URL", "the token endpoint for OAUTHBEARER", "none"),
    "kafka_oauth_scope": ("SCOPE", "the requested scope", "none"),
    "kafka_oauth_audience": ("NAME", "the requested audience", "none"),
    "kafka_ssl_ca": ("FILE", "trusted certificate authorities, in PEM", "the system's"),
    "kafka_ssl_certificate": ("FILE", "the client certificate for brokers, in PEM", "none"),
    "kafka_ssl_key": ("FILE", "its private key", "in the certificate's file"),
}
"""Setting → its metavar, help and default; `settings.py` reads them."""


KAFKA_SETTINGS = tuple([name for name in SETTINGS if name.startswith("kafka_")])
LOG_SETTINGS = ("log", "topic_prefix", *KAFKA_SETTINGS)


@dataclass(frozen=True, slots=True)
class Invocation:
    """One invocation of a command: its arguments, settings and output."""

    arguments: argparse.Namespace
    settings: Settings
    output: Output

    @property
    def topics(self) -> Topics:
        return Topics(self.settings.topic_prefix)


Run = Callable[[Invocation], int | Coroutine[Any, Any, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: its name, help, arguments and function. `settings` are the fields of `Settings` that it reads."""

    name: str
    about: str
    example: str
    run: Run
    add_arguments: Callable[[Parser], None]
    settings: tuple[str, ...]

    def parser(self) -> Parser:
        parser = Parser(
            prog=f"gateway {self.name}",
            description=f"{self.about[0].upper()}{self.about[1:]}.",
            epilog=f"example:\n  {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_arguments(parser)
        kafka = parser.add_argument_group("connection to Kafka") if set(KAFKA_SETTINGS) & set(self.settings) else parser
        for name in self.settings:
            metavar, about, default = SETTINGS[name]
            flag = "--" + name.replace("_", "-")
            place = kafka if name in KAFKA_SETTINGS else parser
            place.add_argument(flag, metavar=metavar, help=f"{about} [env: GATEWAY_{name.upper()}, default: {default}]")
        if self.name != "run":
            parser.add_argument("--json", action="store_true", help="print one JSON object per line, for scripts")
        return parser


REGISTERED: dict[str, Command] = {}


def command(
    name: str,
    *,
    about: str,
    example: str,
    add_arguments: Callable[[Parser], None] = lambda _: None,
    settings: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Register a function as a command."""

    def register(run: Run) -> Run:
        REGISTERED[name] = Command(
            name=name, about=about, example=example, run=run, add_arguments=add_arguments, settings=settings
        )
        return run

    return register


@asynccontextmanager
async def opened_log(call: Invocation, *, may_create: bool = False) -> AsyncIterator[Log]:
    """Open the log, also while a gateway is running. With `may_create`, an embedded log is created if missing."""
    if os.environ.get("GATEWAY_API") and not hasattr(call.arguments, "token_file"):
        call.output.note("GATEWAY_API isn't asked: the API doesn't serve this command, which works on the log itself")
    lines = logs.configure(json=False, level=logging.WARNING, descriptor=2)
    target = call.settings.log
    # A command doesn't take ownership of the log, so it works while a gateway is running.
    is_new = may_create and isinstance(target, EmbeddedTarget) and not target.path.exists()
    try:
        log = await open_log(call.settings, owner=is_new)
        try:
            yield log
        finally:
            await log.close()
    finally:
        lines.close()


def rule_file(call: Invocation) -> Path:
    """Return the rule file. Raises UsageError if two are given."""
    file, flag = call.arguments.file, call.arguments.rules
    if file and flag:
        raise UsageError(f"--rules: expected one rule file, got {file!r} as well")
    return Path(file) if file else call.settings.rules


def rules_without_secrets(path: Path) -> Rules:
    """Read rules for a command that needs no secrets: unresolved references get placeholders."""
    return load_rules(path, resolve=False)


def readable_rules(call: Invocation) -> Rules | None:
    """Return the rules without secrets; None, after a note, if they can't be read: nothing is hidden then."""
    rules, problems = check_rules(call.settings.rules, resolve=False)
    if rules is None:
        why = why_not_rules(call.settings.rules, problems)
        call.output.note(f"{why}, so what it would hide (`redact`) is shown")
    return rules


def note_unknown(output: Output, rules: Rules, route: str | None, destination: str | None) -> None:
    """Say that the local rules lack a name: those of the running gateway decide, which may be others."""
    for flag, name, known in (("--route", route, rules.routes), ("--destination", destination, rules.destinations)):
        if name is not None and name not in known:
            output.note(f"{flag}: {name!r} isn't in the local rules{did_you_mean(name, known)}", style="yellow")


def note_unknown_of(call: Invocation) -> None:
    """Do the same for a command that has found nothing in the log by its --route or --destination."""
    if api_of(call) is not None:
        return  # another machine's rules are in force
    rules, _ = check_rules(call.settings.rules, resolve=False)
    if rules is not None:
        note_unknown(call.output, rules, call.arguments.route, call.arguments.destination)


def why_not_rules(path: Path, problems: Iterable[Problem]) -> str:
    """Return that a rule file can't be read, or where it is refused first and why."""
    by_severity = sorted(problems, key=lambda each: each.severity != "error")
    refusal = next((each for each in by_severity if each.line), None)
    return f"{path} can't be read" if refusal is None else f"{path} is refused ({refusal})"


def read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name}: expected a file, got: {reason_of(error)}") from error


def rule_file_argument(parser: Parser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="routes.yaml", help="the rule file [env: GATEWAY_RULES, default: routes.yaml]"
    )
    parser.add_argument("--rules", metavar="PATH", help="the same, as other commands take it")


API_TOKEN = "GATEWAY_API_TOKEN"  # noqa: S105 - the name of a variable


def api_arguments(parser: Parser) -> None:
    about = "ask the API of a process at URL instead, such as http://127.0.0.1:9090 [env: GATEWAY_API]"
    parser.add_argument("--api", metavar="URL", help=about)
    token_arguments(parser)


def token_arguments(parser: Parser) -> None:
    """Add how a token for the API is given: never as an argument, which every process of the machine can read."""
    about = f"a file with a token for the API; - is stdin [env: {API_TOKEN}, the token itself]"
    parser.add_argument("--token-file", metavar="FILE", help=about)
    about = "send the token to another machine without TLS, where others can read it on the way"
    parser.add_argument("--plain-http", action="store_true", help=about)
    parser.add_argument("--token", type=_no_token, help=argparse.SUPPRESS)


def no_api_argument(parser: Parser, instead: str) -> None:
    """Let a command that the API can't serve say so, with what to do instead."""
    parser.add_argument("--api", type=_NotByApi(instead), help=argparse.SUPPRESS)


@dataclass(frozen=True, slots=True)
class _NotByApi:
    instead: str

    def __call__(self, _: str) -> NoReturn:
        raise argparse.ArgumentTypeError(f"expected none, since the API doesn't serve this command: {self.instead}")


def _no_token(_: str) -> NoReturn:
    raise argparse.ArgumentTypeError(
        f"expected --token-file FILE, or the token in {API_TOKEN}: the arguments of a process are no secret on its "
        "machine, so revoke this token if others use it"
    )


def api_of(call: Invocation) -> str | None:
    """Return the URL of the API that a command asks, None if it asks the log. A flag wins over the variable."""
    given = call.arguments.api
    local = [f"--{name}" for name in ("log", "index") if getattr(call.arguments, name, None) is not None]
    if given is not None and local:
        raise UsageError(f"--api: expected none with {local[0]}, or that alone, got both")
    url = given or (None if local else os.environ.get("GATEWAY_API"))
    return url or None


def token_of(call: Invocation) -> str | None:
    """Return the token for the API, None if there is none. Raises UsageError, which never has it."""
    file = call.arguments.token_file
    given = os.environ.get(API_TOKEN, "")
    if file is None and not given and os.environ.get("GATEWAY_TOKEN"):
        call.output.note(
            f"GATEWAY_TOKEN isn't read: a token for the API is in {API_TOKEN}, or in --token-file", style="yellow"
        )
    where = API_TOKEN if file is None else f"--token-file: {file}"
    text = given if file is None else read(file).decode("utf-8", "replace")
    token = text.strip()
    if (file is not None and not token) or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{where}: expected a token")
    return token or None


def why_argument(parser: Parser) -> None:
    about = "the reason, which `gateway audit list` shows"
    parser.add_argument("--why", default="", metavar="TEXT", help=about)


def yes_argument(parser: Parser) -> None:
    parser.add_argument(
        "--yes", action="store_true", help="don't ask for confirmation; needed where nobody can be asked"
    )


def may_drop(call: Invocation, what: str, *, warning: str = "") -> bool:
    """Ask before something is dropped, unless told not to; if the answer is no, say that nothing was.

    Raises UsageError if nobody is there to be asked, as in a script.
    """
    if call.arguments.yes:
        return True
    if not call.output.is_interactive or call.output.json:
        raise UsageError(f"expected --yes, since it can't ask; it would drop {what}")
    if call.output.confirm(f"drop {what}?{warning}"):
        return True
    call.output.print("nothing was dropped")
    return False


def wait_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wait until the running gateway has carried it out",
    )
    parser.add_argument(
        "--timeout", type=duration, default=30.0, metavar="DURATION", help="how long to wait (default: 30s)"
    )
