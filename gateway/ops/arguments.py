"""What may stand on the command line: argparse, and the kinds of its values."""

import argparse
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple, NoReturn

from typing_extensions import override

from gateway.model import DeadReason
from gateway.ops.output import Output
from gateway.rules.schema import parse_rate
from gateway.settings import log_target
from gateway.verify.keys import parse_duration, signing_key


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    @override
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        Output(json=False).fail(f"{message}; `{self.prog} --help` shows what it takes")
        self.exit(2)


# ---- What each command takes ----


def run_arguments(parser: Parser) -> None:
    about = "for trying out: make missing topics, and only warn of a broker's settings that could lose events"
    parser.add_argument("--dev", action="store_const", const="true", help=f"{about} (GATEWAY_DEV)")
    parser.set_defaults(json=False)


def rule_file_argument(parser: Parser) -> None:
    parser.add_argument("file", nargs="?", metavar="routes.yaml", help="the rule file (GATEWAY_RULES; routes.yaml)")
    parser.set_defaults(rules=None)


def check_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    about = "look also at the events that the log has of the last 1h: do identities tell each apart, by these rules?"
    parser.add_argument("--since", type=duration, metavar="DURATION", help=about)


def explain_arguments(parser: Parser) -> None:
    rule_file_argument(parser)
    about = "a file with a body, - for stdin, an event of the log by its id or place, or the name of a source"
    parser.add_argument("event", metavar="EVENT", help=about)
    parser.add_argument("--source", metavar="SOURCE", help="who would have sent it; needed, but with an event's id")
    parser.add_argument("--header", action="append", default=[], type=header, metavar="'K: V'", help="repeatable")
    parser.add_argument("--query", action="append", default=[], type=parameter, metavar="K=V", help="repeatable")
    parser.add_argument("--show-secrets", action="store_true", help="mask nothing")


def send_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="whose event it is, by the rules")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the body; - is stdin; a small JSON object by default")
    parser.add_argument("--url", default="http://127.0.0.1:8080", metavar="URL", help="without a path: the source's")
    parser.add_argument("--type", default="test", metavar="TYPE", help="where the provider has the type in a header")
    parser.add_argument("--id", metavar="ID", help="where it has the identity in a header; a new one by default")
    parser.add_argument("--header", action="append", default=[], type=header, metavar="'K: V'", help="repeatable")
    parser.add_argument("--secret", metavar="SECRET", help="instead of the rules' own")
    parser.add_argument("--count", type=positive, default=1, metavar="N", help="send N, one after the other")
    parser.add_argument("--forge", action="store_true", help="with a signature that is wrong")


def receive_arguments(parser: Parser) -> None:
    parser.add_argument("--port", type=port, default=9101, metavar="PORT", help="0 takes a free one (9101)")
    parser.add_argument("--host", default="127.0.0.1", metavar="HOST", help="where to listen (127.0.0.1)")
    parser.add_argument(
        "--respond", type=statuses, default=[200], metavar="STATUSES", help="in turn; the last repeats (200)"
    )
    parser.add_argument("--delay", type=duration, default=0.0, metavar="DURATION", help="before each answer (0s)")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        type=signing_secret,
        metavar="whsec_…",
        help="verify by it; repeatable",
    )


def filter_arguments(parser: Parser) -> None:
    parser.add_argument("--route", metavar="NAME")
    parser.add_argument("--destination", metavar="NAME")
    parser.add_argument("--reason", choices=list(map(str, DeadReason)), metavar="REASON", help=", ".join(DeadReason))
    parser.add_argument("--since", type=duration, metavar="DURATION", help="written in the last 2h")
    parser.add_argument("--until", type=duration, metavar="DURATION", help="written before the last 5m")


def dead_list_arguments(parser: Parser) -> None:
    filter_arguments(parser)
    parser.add_argument("--limit", type=positive, default=50, metavar="N", help="at most so many, the newest (50)")
    parser.add_argument("--all", action="store_true", help="those that were replayed or dropped, too")


def settle_arguments(parser: Parser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="of a delivery or an event")
    filter_arguments(parser)
    parser.add_argument("--all", action="store_true", help="every open dead letter")
    parser.add_argument("--dry-run", action="store_true", help="only tell how many it would be")
    parser.set_defaults(yes=False)
    wait_arguments(parser)


def drop_arguments(parser: Parser) -> None:
    settle_arguments(parser)
    parser.add_argument("--yes", action="store_true", help="don't ask on a terminal")


def wait_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="until the running gateway has done it"
    )
    parser.add_argument("--timeout", type=duration, default=30.0, metavar="DURATION", help="of the wait (30s)")


def events_arguments(parser: Parser) -> None:
    parser.add_argument("--source", metavar="SOURCE")
    parser.add_argument("--limit", type=positive, default=20, metavar="N", help="at most so many, the newest (20)")
    parser.add_argument("--since", type=duration, metavar="DURATION", help="appended in the last 1h")


def event_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="the event's id, or its place, TOPIC/PARTITION@OFFSET")
    parser.add_argument("--source", metavar="SOURCE", help="look only there")
    parser.add_argument("--all", action="store_true", help="every copy, not only the newest")


def dead_show_arguments(parser: Parser) -> None:
    parser.add_argument("id", metavar="ID", help="of its delivery or event, or PARTITION@OFFSET")


def replay_arguments(parser: Parser) -> None:
    about = "appended at or after it: 2h ago, or a time such as 2026-11-25T08:00:00Z"
    parser.add_argument("--route", metavar="NAME", help="whose events; every route's with --undelivered alone")
    parser.add_argument("--from", dest="since", type=moment, metavar="WHEN", help=about)
    parser.add_argument("--to", dest="until", type=moment, metavar="WHEN", help="appended before it, likewise (now)")
    parser.add_argument("--destination", metavar="NAME", help="to this one only")
    parser.add_argument("--source", metavar="NAME", help="from this one only")
    parser.add_argument(
        "--undelivered", action="store_true", help="only what the route has not delivered, by what the log knows"
    )
    parser.add_argument(
        "--rate",
        type=rate,
        metavar="RATE",
        help="deliveries over the whole fleet: 100/s, 10/m (what the gateway bears)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell how many it would be, by the rules here")
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="until the running gateway has done it"
    )
    parser.add_argument(
        "--timeout", type=duration, default=30.0, metavar="DURATION", help="of the wait for a next sign of life (30s)"
    )
    other = parser.add_mutually_exclusive_group()
    about = "this one, by its id (of several the newest) or its place, TOPIC/PARTITION@OFFSET"
    other.add_argument("--event", metavar="ID", help=f"{about}, by the routes that match it, or --route")
    other.add_argument("--follow", metavar="ID", help="wait for this replay, which is under way")
    other.add_argument("--cancel", metavar="ID", help="end this replay")


def status_arguments(parser: Parser) -> None:
    parser.add_argument("destination", nargs="?", metavar="DESTINATION", help="one alone, with its last attempts")
    about = "HOST:PORT of a process, to ask it what it holds in memory; repeatable (the one that GATEWAY_ADMIN names)"
    parser.add_argument("--admin", dest="asked", action="append", default=[], metavar="HOST:PORT", help=about)


def order_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="by the rules")
    parser.add_argument("--force", action="store_true", help="though the rules don't know the name")
    wait_arguments(parser)


def migrate_arguments(parser: Parser) -> None:
    parser.add_argument("--from", dest="source", type=log_url, required=True, metavar="URL", help="sqlite:///FILE")
    about = "kafka://HOST:PORT[,HOST:PORT]"
    parser.add_argument("--to", dest="log", type=log_url, required=True, metavar="URL", help=about)


def backup_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="where to; what is there already is replaced in one step")


def restore_arguments(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="a copy that `gateway backup` has made; it stays where it is")


# ---- Kinds of values ----


def log_url(text: str) -> str:
    try:
        log_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a duration such as 30s, 5m or 2h, got {text!r}") from None


class Moment(NamedTuple):
    """A time, as an operator may put it: so many seconds ago, or a Unix time."""

    seconds: float
    is_ago: bool

    def on(self, now: float) -> float:
        """Return it as a Unix time."""
        return now - self.seconds if self.is_ago else self.seconds


def moment(text: str) -> Moment:
    with suppress(ValueError):
        return Moment(parse_duration(text), is_ago=True)
    with suppress(ValueError):
        at = datetime.fromisoformat(text)
        if "T" in text.upper() and at.tzinfo is not None:  # RFC 3339 knows no time without its zone
            return Moment(at.timestamp(), is_ago=False)
    raise argparse.ArgumentTypeError(
        f"expected a duration such as 2h, or a time with its zone such as 2026-11-25T08:00:00Z, got {text!r}"
    )


def rate(text: str) -> float:
    try:
        return parse_rate(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a rate such as 100/s, 10/m or 5/h, got {text!r}") from None


def header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or any(char in text for char in "\r\n\0"):
        raise argparse.ArgumentTypeError(f"expected 'Name: value', got {text!r}")
    return name.strip(), value.strip()


def parameter(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:  # noqa: PLR2004 - the largest port
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def statuses(text: str) -> list[int]:
    statuses = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(200 <= status <= 599 for status in statuses):  # noqa: PLR2004 - statuses of final answers
        raise argparse.ArgumentTypeError(f"expected statuses such as 503,503,200, got {text!r}")
    return statuses


def signing_secret(text: str) -> str:
    try:
        signing_key(text)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a secret of the form whsec_ and base64, got another text") from None
    return text
