"""How commands print: with rich for people, or one JSON object a line for scripts.

Control characters in data from senders and destinations are removed: a body must not move the reader's cursor or
recolour their terminal.
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
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gateway.telemetry.logs import printable, printable_json

PIPE_WIDTH = 160
"""Columns if the width is unknown; rich would assume 80 and wrap the tables."""
HEX_BYTES = 16  # per line, as in `xxd`


class Output:
    """A command's output: results on stdout, everything else on stderr. With `json`, only `line` prints to stdout."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
        # Markup is off: a route may be called `[red]`.
        self._out = Console(width=width, highlight=False, markup=False, emoji=False)
        self._err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @property
    def is_interactive(self) -> bool:
        """Return whether a person can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def line(self, fields: Mapping[str, object]) -> None:
        """Print one JSON object, and flush it."""
        sys.stdout.write(json_line(fields) + "\n")
        sys.stdout.flush()

    def print(self, *parts: "str | tuple[str, str] | Text") -> None:
        """Print a line for people: texts, or texts with a style."""
        if not self.json:
            self._out.print(Text.assemble(*[_shown(part) for part in parts]), soft_wrap=True)

    def block(self, text: str) -> None:
        """Print a string of several lines for people, unchanged."""
        if not self.json:
            self._out.print(Text(printable(text, keep="\n\t")), soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence["str | Text"]],
        *,
        right: Sequence[str] = (),
        unbroken: Sequence[str] = (),
    ) -> None:
        """Print a table for people: columns in `right` are aligned to the right, `unbroken` ones narrowed last."""
        if self.json:
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
        for column in columns:
            justify: JustifyMethod = "right" if column in right else "left"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=column in unbroken)
        for row in rows:
            # Rows of several lines are separated by space.
            table.leading |= any("\n" in str(cell) for cell in row)
            table.add_row(*[cell if isinstance(cell, Text) else Text(printable(cell, keep="\n")) for cell in row])
        self._out.print(table)

    def note(self, text: str, *, style: str = "dim") -> None:
        """Print something besides the result, on stderr."""
        self._err.print(Text(printable(text, keep="\n"), style=style))

    def fail(self, text: str) -> None:
        """Print `error: ` and a line for each problem."""
        for problem in text.splitlines() or ["failed"]:
            self._err.print(Text.assemble(("error: ", "bold red"), printable(problem)))

    def confirm(self, question: str) -> bool:
        self._err.print(Text(f"{question} [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a spinner on a terminal while something takes long."""
        if not self._err.is_terminal:
            yield
            return
        with self._err.status(Text(text)):
            yield

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar on a terminal; call the yielded function after each of `total`."""
        with Progress(console=self._err, transient=True, disable=not self._err.is_terminal or total < 2) as bar:  # noqa: PLR2004 - one needs no bar
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def gauge(self, text: str, total: int, *, begun: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Show a progress bar with the estimated remaining time, on a terminal, starting at `begun`.

        Call the yielded function with how much of `total` is done, and a text to show next to it.
        """
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._err, transient=True, disable=not self._err.is_terminal) as bar:
            task = bar.add_task(text, total=total, completed=begun, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)


def json_line(fields: Mapping[str, object]) -> str:
    """Return a JSON object on one line, without its end.

    Bytes of a name that aren't UTF-8 are escaped, and so is what a terminal would obey: nothing says that it is read by
    a program.
    """
    try:
        return printable_json(orjson.dumps(fields)).decode()
    except orjson.JSONEncodeError:
        return printable_json(json.dumps(fields).encode()).decode()


def when(at: float) -> str:
    """Return a Unix time for people, in their time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def rfc3339(at: float) -> str:
    """Return a Unix time for scripts, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def body_fields(body: bytes) -> dict[str, str]:
    """Return a body as JSON fields: `body` if it is UTF-8, else `body_base64`."""
    try:
        return {"body": body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": b64encode(body).decode()}


def body_text(body: bytes) -> str:
    """Return a body for people: as text if it is UTF-8, else as a hex dump."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return hex_dump(body)
    return hex_dump(body) if "\0" in text else text


def hex_dump(body: bytes) -> str:
    """Return offset, bytes and their ASCII characters, 16 bytes a line."""
    lines = []
    for at in range(0, len(body), HEX_BYTES):
        piece = body[at : at + HEX_BYTES]
        shown = "".join([chr(byte) if 32 <= byte < 127 else "." for byte in piece])  # noqa: PLR2004 - ASCII's printable ones
        lines.append(f"{at:08x}  {piece.hex(' ', -2):<39}  {shown}")
    return "\n".join(lines)


def header_text(value: bytes) -> str:
    """Return a header's name or value as text; bytes that aren't UTF-8 are escaped."""
    return value.decode("utf-8", "backslashreplace")


def _shown(part: "str | tuple[str, str] | Text") -> "str | tuple[str, str] | Text":
    if isinstance(part, Text):
        return part
    return printable(part) if isinstance(part, str) else (printable(part[0]), part[1])


VERBS = {"is": "are"}
"""Singular → plural."""


def count(number: int, what: str, verb: str = "") -> str:
    """Return "1 delivery" or "2 deliveries"; with a verb in the singular, "1 delivery is" or "2 deliveries are"."""
    plural = what[:-1] + "ies" if what.endswith("y") and what[-2] not in "aeo" else what + "s"
    text = f"{number:,} {what if number == 1 else plural}"
    return f"{text} {verb if number == 1 else VERBS[verb]}" if verb else text
