"""How commands print: for people by rich, for scripts one JSON object a line.

What comes from senders and destinations is shown without its control characters: a body must not be able to move the
reader's cursor, nor to recolour their terminal.
"""

import json
import os
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import orjson
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gateway.telemetry.logs import printable

PIPE_WIDTH = 160
"""Columns where nobody says how wide the reader is; rich would take 80 and fold the tables."""
HEX_BYTES = 16  # a line, as `xxd` has it


class Output:
    """Where a command prints: results to stdout, everything else to stderr. With `json`, only `line` reaches stdout."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
        # Markup is off: a route may be called `[red]`.
        self._out = Console(width=width, highlight=False, markup=False, emoji=False)
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @property
    def is_interactive(self) -> bool:
        """Return whether somebody can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def line(self, fields: Mapping[str, object]) -> None:
        """Print one JSON object, at once."""
        sys.stdout.write(json_line(fields) + "\n")
        sys.stdout.flush()

    def say(self, *parts: "str | tuple[str, str] | Text") -> None:
        """Print a line for people: texts, or texts with a style."""
        if not self.json:
            self._out.print(Text.assemble(*[_shown(part) for part in parts]), soft_wrap=True)

    def block(self, text: str) -> None:
        """Print a string of several lines for people, as it is."""
        if not self.json:
            self._out.print(Text(printable(text, keep="\n\t")), soft_wrap=True)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence["str | Text"]], *, right: Sequence[str] = ()
    ) -> None:
        """Print a table for people; the columns in `right` are aligned to the right."""
        if self.json:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            # Rows of several lines are set apart.
            table.leading |= any("\n" in str(cell) for cell in row)
            table.add_row(*[cell if isinstance(cell, Text) else Text(printable(cell, keep="\n")) for cell in row])
        self._out.print(table)

    def note(self, text: str, *, style: str = "dim") -> None:
        """Tell people something beside the result, on stderr."""
        self._err.print(Text(printable(text, keep="\n"), style=style))

    def fail(self, text: str) -> None:
        """Say what went wrong: `error: ` and a line for each problem."""
        for problem in text.splitlines() or ["failed"]:
            self._err.print(Text.assemble(("error: ", "bold red"), printable(problem)))

    def confirm(self, question: str) -> bool:
        self._err.print(Text(f"{question} [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Turn a spinner on a terminal while something takes long."""
        if not self._err.is_terminal:
            yield
            return
        with self._err.status(Text(text)):
            yield

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Show how many of `total` are done, on a terminal; what is handed out is called after each."""
        with Progress(console=self._err, transient=True, disable=not self._err.is_terminal or total < 2) as bar:  # noqa: PLR2004 - one is no progress
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def gauge(self, text: str, total: int, *, begun: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Show how far something long has come, on a terminal, with the time that it will still take, about.

        It begins at `begun`; what is handed out is called with how much of `total` is done, and what to show beside it.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._err, transient=True, disable=not self._err.is_terminal) as bar:
            task = bar.add_task(text, total=total, completed=begun, told="")
            yield lambda done, told: bar.update(task, completed=done, told=told)


def json_line(fields: Mapping[str, object]) -> str:
    """Return a JSON object in one line, without its end. Bytes of a name that weren't UTF-8 are escaped."""
    try:
        return orjson.dumps(fields).decode()
    except orjson.JSONEncodeError:
        return json.dumps(fields)


def when(at: float) -> str:
    """Return a Unix time as people read it, in their time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def rfc3339(at: float) -> str:
    """Return a Unix time as scripts read it, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def body_fields(body: bytes) -> dict[str, str]:
    """Return a body as fields of JSON: `body` if it is text in UTF-8, else `body_base64`."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": b64encode(body).decode()}


def body_text(body: bytes) -> str:
    """Return a body for people: the text if it is one in UTF-8, else a hex dump."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return hex_dump(body)
    return hex_dump(body) if "\0" in text else text


def hex_dump(body: bytes) -> str:
    """Return offset, bytes and their ASCII, 16 bytes a line."""
    lines = []
    for at in range(0, len(body), HEX_BYTES):
        piece = body[at : at + HEX_BYTES]
        shown = "".join([chr(byte) if 32 <= byte < 127 else "." for byte in piece])  # noqa: PLR2004 - ASCII's printable ones
        lines.append(f"{at:08x}  {piece.hex(' ', -2):<39}  {shown}")
    return "\n".join(lines)


def header_text(value: bytes) -> str:
    """Return a header's name or value as text, whatever bytes it has."""
    return value.decode("utf-8", "backslashreplace")


def _shown(part: "str | tuple[str, str] | Text") -> "str | tuple[str, str] | Text":
    if isinstance(part, Text):
        return part
    return printable(part) if isinstance(part, str) else (printable(part[0]), part[1])


VERBS = {"is": "are", "goes": "go"}
"""What one thing does → what several do."""


def count(number: int, what: str, verb: str = "") -> str:
    """Return "1 delivery" or "2 deliveries"; with a verb as of one, "1 delivery goes" or "2 deliveries go"."""
    plural = what[:-1] + "ies" if what.endswith("y") else what + "s"
    said = f"{number:,} {what if number == 1 else plural}"
    return f"{said} {verb if number == 1 else VERBS[verb]}" if verb else said
