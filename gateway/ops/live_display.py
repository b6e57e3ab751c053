"""A live list of deliveries in the terminal: `r` sends one again, `f` filters, the arrows select, `q` ends."""

import asyncio
import codecs
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.model import GatewayError
from gateway.ops.live_list import Listed, LiveList, Quit, Resend, State, keys_of
from gateway.telemetry.logs import printable

REDRAW = 0.1
"""Seconds between two drawings, so that a burst of events isn't drawn one by one."""
TICK = 1.0
"""Seconds after which the ages are drawn anew, if nothing else is new."""
FRAME = 3  # lines beside the rows: the head and its line, and the status
MAX_READ = 1024  # bytes of keys at a time
_STYLES = {"delivered": "green", "pending": "yellow", "failed": "red", "dead": "bold red"}
_HELP = "r resend  f filter  ↑↓ select  q quit"

Send = Callable[[Listed], Awaitable[str]]
"""Sends a delivery again, and returns what has come of it. Raises GatewayError, OSError or TimeoutError."""


class LiveDisplay:
    """A list that is drawn on the terminal until its user quits.

    `items` feeds it, and may tell what there is to know of where they come from; `resend` carries out `r`.
    """

    def __init__(self, items: AsyncIterator[Listed | State], resend: Send) -> None:
        self._items = items
        self._resend = resend
        self._list = LiveList()
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._changed = asyncio.Event()
        self._quit = asyncio.Event()
        self._has_ended = False
        self._resending: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = ""
        self._resends: asyncio.Queue[Listed] = asyncio.Queue(1)

    async def run(self) -> None:
        """Show the list until `q`, or the end of the terminal, which is then as before.

        When `items` has ended, what is there stays on show. Raises what `items` raises.
        """
        try:
            await self._run()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        descriptor = sys.stdin.fileno()
        with _single_keys(descriptor), Live(console=self._console, screen=True, auto_refresh=False) as live:
            loop.add_reader(descriptor, self._read, descriptor)
            loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [
                        tasks.create_task(self._follow(), name="live-list-items"),
                        tasks.create_task(self._carry_out(), name="live-list-resends"),
                        tasks.create_task(self._draw(live), name="live-list-display"),
                    ]
                    await self._quit.wait()
                    for task in running:
                        task.cancel()
            finally:
                loop.remove_reader(descriptor)
                loop.remove_signal_handler(signal.SIGWINCH)

    async def _follow(self) -> None:
        async for item in self._items:
            if isinstance(item, State):
                self._list.state = item.text
            else:
                self._list.put(item)
            self._changed.set()
        self._has_ended = True
        self._changed.set()

    async def _carry_out(self) -> None:
        while True:
            item = await self._resends.get()
            try:
                result = await self._resend(item)
            except (GatewayError, OSError, TimeoutError) as error:
                result = str(error) or "no response in time"
            self._resending = None
            self._list.note = f"{item.id}: {result}"
            self._changed.set()

    async def _draw(self, live: Live) -> None:
        while True:
            self._changed.clear()
            live.update(self._frame(time.time()), refresh=True)
            await asyncio.sleep(REDRAW)
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._changed.wait()

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, MAX_READ)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            self._quit.set()
            return
        keys, self._begun = keys_of(self._begun + self._decoder.decode(data))
        for key in keys:
            match self._list.press(key):
                case Quit():
                    self._quit.set()
                case Resend(item) if self._resending is None:
                    self._resending = item.id
                    self._resends.put_nowait(item)
                case Resend() | None:  # one at a time: the status says which
                    pass
        self._changed.set()

    def _frame(self, now: float) -> Group:
        window = self._list.window(max(1, self._console.height - FRAME))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", expand=True)
        for column in ("age", "source", "type", "destination", "status", ""):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for at, item in enumerate(window.rows):
            cells = (_age(now - item.at), item.source, item.type, item.destination)
            status = Text(printable(item.status), style=_STYLES.get(item.status, ""))
            table.add_row(
                *[Text(printable(cell)) for cell in cells], status, Text(printable(item.detail)),
                style="reverse" if at == window.selected else "",
            )  # fmt: skip
        return Group(table, Text(printable(self._status()), no_wrap=True, overflow="ellipsis", style="dim"))

    def _status(self) -> str:
        if self._list.edited is not None:
            return f"filter: {self._list.edited}▏  enter applies, escape leaves it"
        parts = [self._list.state, _HELP] if self._list.state else [_HELP]
        if self._list.filter:
            parts.append(
                f"{len(self._list.matching())} of {self._list.total} with {self._list.filter!r}, escape shows all"
            )
        if self._list.dropped:
            parts.append(f"{self._list.dropped} older ones aren't kept")
        if self._has_ended:
            parts.append("no more come")
        if self._resending is not None:
            parts.append(f"resending {self._resending}")
        elif self._list.note:
            parts.append(self._list.note)
        return " · ".join(parts)


@contextmanager
def _single_keys(descriptor: int) -> Iterator[None]:
    """Get each key at once, without its echo, until the end."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        with suppress(termios.error):  # it is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _age(seconds: float) -> str:
    """Return how long ago something was, in the largest unit that fits."""
    whole = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"
