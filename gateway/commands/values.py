"""What is allowed on the command line: the parser, and the types of values."""

import argparse
import re
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple, NoReturn

from typing_extensions import override

from gateway.ops.output import Output
from gateway.rules.value_kinds import parse_rate
from gateway.settings import log_target
from gateway.text import did_you_mean, parse_duration
from gateway.verify.encodings import signing_key


class Parser(argparse.ArgumentParser):
    """Reports an error on one line."""

    @override
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        Output(json=False).fail(f"{message}; `{self.prog} --help` shows what it takes")
        self.exit(2)


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


def position(text: str) -> str:
    """Read where a record is in a topic of the gateway: PARTITION@OFFSET, without leading zeros."""
    if not re.fullmatch(r"(0|[1-9][0-9]{0,9})@(0|[1-9][0-9]{0,18})", text):
        raise argparse.ArgumentTypeError(f"expected PARTITION@OFFSET, such as 2@1041, got {text!r}")
    return text


def refusal(text: str) -> str:
    """Read a reason for which requests are refused, or for which a record of one can't be shown."""
    from gateway.ops.rejected import UNREADABLE  # noqa: PLC0415 - few commands need it
    from gateway.telemetry.metrics import REJECTIONS  # noqa: PLC0415 - few commands need it

    known = [*REJECTIONS, UNREADABLE]
    if text not in known:
        raise argparse.ArgumentTypeError(f"unknown reason {text!r}{did_you_mean(text, known)}")
    return text


class Moment(NamedTuple):
    """A time as an argument: a number of seconds ago, or a Unix time."""

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
        raise argparse.ArgumentTypeError("expected a secret of the form whsec_ and base64") from None
    return text
