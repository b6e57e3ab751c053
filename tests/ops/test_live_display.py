"""A live list on a real terminal: a pseudo-terminal, whose other end types and reads."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.interruptible import interruptible

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 30.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The other end of a terminal of 12 lines, of 80 characters."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self._descriptor = descriptor
        self.process = process
        self.output = ""

    @property
    def screen(self) -> str:
        """What was drawn last: each frame begins with the cursor's way home."""
        return _CONTROL.sub("", self.output.rpartition("\x1b[H")[2])

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, is_so: Callable[[str], object]) -> str:
        """Read until the screen is so, and return it."""
        until = time.monotonic() + PATIENCE
        while not is_so(self.screen):
            assert time.monotonic() < until, self.screen
            if select.select([self._descriptor], [], [], 0.2)[0]:
                with suppress(OSError):  # its process has ended
                    self.output += os.read(self._descriptor, 65_536).decode(errors="replace")
        return self.screen

    def has(self, text: str) -> str:
        return self.until(lambda screen: text in screen)

    def hang_up(self) -> None:
        os.close(self._descriptor)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._descriptor)[3] & termios.ECHO)


@contextmanager
def a_list(how: str = "goes-on") -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = (sys.executable, "-m", "tests.ops.live_display_child", how)
    environ = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environ.pop(name, None)
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 80, 0, 0))
    with interruptible():
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, cwd=ROOT, start_new_session=True
        )
    with process:
        try:
            yield Terminal(ours, process)
        finally:
            process.kill()
            with suppress(OSError):  # it was hung up
                os.close(ours)
            os.close(theirs)


def test_deliveries_are_listed_and_one_is_resent() -> None:
    with a_list() as terminal:
        told = ("age", "source", "destination", "r resend", "shop22")
        screen = terminal.until(lambda screen: all(text in screen for text in told))
        assert "shop21" not in screen  # which has no room in 12 lines
        assert "[2Jred" in screen
        assert not terminal.echoes()
        terminal.type("rr")
        terminal.has("dlv_hostile: 200, number 1")
        assert "delivered" in terminal.has("200 in 3 ms")
        terminal.type("r")
        terminal.has("dlv_hostile: 200, number 2")
        terminal.type("\x1b[B")
        terminal.type("r")
        terminal.has("dlv_29: connection refused")
        terminal.type("q")
        terminal.has("ended")
        assert terminal.process.wait(PATIENCE) == 0
        assert terminal.echoes()
        assert "\x1b[?1049l" in terminal.output  # the screen as before
        assert "Exception" not in terminal.output


def test_a_filter_is_typed_and_left() -> None:
    with a_list() as terminal:
        terminal.has("shop29")
        terminal.type("fshop1")
        screen = terminal.has("filter: shop1")
        assert "shop29" not in terminal.until(lambda screen: "shop19" in screen and "shop29" not in screen)
        terminal.type("7\r")
        screen = terminal.has("1 of 31 with 'shop17'")
        assert "shop17" in screen
        assert "shop16" not in screen
        terminal.type("\x1b")
        terminal.has("shop29")


def test_the_list_fits_the_terminal_when_that_changes() -> None:
    with a_list() as terminal:
        terminal.has("shop29")
        terminal.size(40, 100)
        terminal.has("shop0 ")
        terminal.size(6, 60)
        terminal.until(lambda screen: "shop29" in screen and "shop0 " not in screen)


@pytest.mark.parametrize(
    ("how", "told"), [("ends", "no more come"), ("fails", "ended by ConnectionError the stream broke")]
)
def test_the_end_of_its_events_is_told(how: str, told: str) -> None:
    with a_list(how) as terminal:
        terminal.has(told)
        if how == "ends":
            terminal.type("q")
        assert terminal.process.wait(PATIENCE) == 0
        assert terminal.echoes()


def test_an_interrupt_leaves_the_terminal_as_it_was() -> None:
    with a_list() as terminal:
        terminal.has("shop29")
        terminal.process.send_signal(signal.SIGINT)
        terminal.has("ended by KeyboardInterrupt")
        assert terminal.process.wait(PATIENCE) == 0
        assert terminal.echoes()
        assert "\x1b[?1049l" in terminal.output


def test_it_ends_with_its_terminal() -> None:
    with a_list() as terminal:
        terminal.has("shop29")
        terminal.hang_up()
        assert terminal.process.wait(PATIENCE) != 0
