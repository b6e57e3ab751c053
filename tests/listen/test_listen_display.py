"""`gateway listen` on a terminal: the list, its keys, and what it says of the connection."""

import asyncio
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import orjson
import pytest

from tests.gateway_process import ROOT, GatewayProcess
from tests.listen.cutting_proxy import CuttingProxy
from tests.listen.listener import api_of, send
from tests.ops.test_live_display import PATIENCE, Terminal
from tests.sink import Sink

pytestmark = [pytest.mark.timeout(240), pytest.mark.rotated(share=1 / 5, group="listen")]


@contextmanager
def a_listener(*words: str) -> Iterator[Terminal]:
    """Run it on a terminal of 12 lines, of 150 characters."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environ.pop(name, None)
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 150, 0, 0))
    command = (sys.executable, "-m", "gateway", "listen", *words)
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            yield Terminal(ours, process)
        finally:
            process.kill()
            with suppress(OSError):  # it was hung up
                os.close(ours)
            os.close(theirs)


async def listens(terminal: Terminal) -> None:
    """Wait until it listens: what is stored from now on is listed."""
    await asyncio.to_thread(terminal.until, lambda screen: "r resend" in screen and "connecting" not in screen)


async def test_events_are_listed_as_they_come_and_one_is_sent_again(gateway: GatewayProcess) -> None:
    async with Sink(200, 500, 200) as sink:
        with a_listener("--api", api_of(gateway), "--forward", sink.url) as terminal:
            await listens(terminal)
            first = await send(gateway, b'{"n": 1}')
            await asyncio.to_thread(terminal.has, first)
            second = await send(gateway, b'{"n": 2}', source="shop")
            told = (second, "500 in ", first, "200 in ", "r resend")
            screen = await asyncio.to_thread(terminal.until, lambda screen: all(text in screen for text in told))
            assert f"127.0.0.1:{sink.port}" in screen
            assert screen.index(second) < screen.index(first), "the newest come first"
            terminal.type("r")
            await asyncio.to_thread(terminal.until, lambda screen: screen.count("200 in ") >= 3)
            assert [request.body for request in sink.requests] == [b'{"n": 1}', b'{"n":2}', b'{"n":2}']
            terminal.type("fshop\r")
            screen = await asyncio.to_thread(terminal.has, "1 of 2 with 'shop'")
            assert first not in screen
            third = await send(gateway, b'{"n": 3}')
            await sink.received(4)
            assert third not in terminal.screen
            terminal.type("\x1b")
            await asyncio.to_thread(terminal.has, third)
            terminal.type("q")
            assert await asyncio.to_thread(terminal.process.wait, PATIENCE) == 0
            assert terminal.echoes()


async def test_a_cut_connection_is_told_and_that_it_is_back(gateway: GatewayProcess) -> None:
    async with CuttingProxy(gateway.admin_port, seed=1) as proxy:
        with a_listener("--api", proxy.url) as terminal:
            await listens(terminal)
            first = await send(gateway, b"{}")
            await asyncio.to_thread(terminal.has, first)
            proxy.is_down = True
            proxy.cut_all()
            await asyncio.to_thread(terminal.has, "reconnecting in")
            second = await send(gateway, b"{}")
            proxy.is_down = False
            await asyncio.to_thread(terminal.until, lambda screen: second in screen and "reconnecting" not in screen)
            terminal.type("r")
            await asyncio.to_thread(terminal.has, "expected --forward")


async def test_hostile_names_are_shown_visibly(gateway: GatewayProcess) -> None:
    name = "\x1b[2J\x1b]0;owned\x07\u202edeppilf\r\n"
    with a_listener("--api", api_of(gateway)) as terminal:
        await listens(terminal)
        before = terminal.output
        event = await send(gateway, orjson.dumps({"type": name}), source="odd")
        screen = await asyncio.to_thread(terminal.has, event)
        assert "\\x1b[2J" in screen
        for hostile in ("\x1b[2J\x1b]0", "\x1b]0", "\x07", "\u202e"):
            assert hostile not in terminal.output[len(before) :]


async def test_who_isnt_let_in_gets_the_terminal_back_with_the_reason(gateway: GatewayProcess) -> None:
    with a_listener("--api", api_of(gateway), "nothing:x") as terminal:
        await asyncio.to_thread(terminal.until, lambda _: "query:1: expected one of" in terminal.output)
        assert await asyncio.to_thread(terminal.process.wait, PATIENCE) == 2
        assert terminal.echoes()
        assert "Traceback" not in terminal.output
