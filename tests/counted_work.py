"""Counts what one event costs a gateway: `python -m tests.counted_work sqlite:///FILE` (or `kafka://HOST:PORT`).

It prints a JSON object, of one event's work in the thread of the event loop: the median of many, which came one after
the other, each delivered before the next one was sent. Nothing in it is a time, so it is the same on each machine:

    time         stands still from the first delivery on, but for a millisecond an event
    one process  sender and destination are a thread of it, with sockets that block; its work isn't counted
"""

import asyncio
import gc
import hashlib
import hmac
import selectors
import socket
import sqlite3
import sys
import tempfile
import threading
from asyncio import base_events, events, selector_events
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from statistics import mean, median
from time import monotonic, sleep
from types import BuiltinFunctionType, FrameType
from typing import Any, TypeVarTuple

import orjson
from typing_extensions import override

from gateway import garbage
from gateway.run import Gateway
from gateway.settings import from_sources
from gateway.telemetry import logs

Ts = TypeVarTuple("Ts")

WARM_UP, EVENTS = 100, 300
STEP = 0.001
"""Seconds by which the event loop's time moves on with each event."""
PATIENCE = 30.0
POLL = 0.02
OURS = str(Path(garbage.__file__).parent)
SECRET = "It's a Secret to Everybody"
RULES = """\
version: 1
sources:
  github: {verify: {scheme: github, secrets: ["%s"]}}
destinations:
  ci: {url: "http://127.0.0.1:%d/hook"}
routes:
  - {name: build, from: github, match: {type: push, body.ref: refs/heads/main}, to: ci}
"""
SYSTEM_CALLS = {"accept", "connect", "recv", "recv_into", "send", "sendmsg"}
"""Methods of sockets that enter the kernel for an event."""
UNCOUNTED = {selectors.__file__, base_events.__file__, events.__file__, selector_events.__file__, __file__}
"""How often the event loop looks for what is ready, depends on who is first: a thread or a socket."""
HEAD_END = b"\r\n\r\n"


class _Selector(selectors.DefaultSelector):
    """Says when the event loop has nothing to do. It waits for events, not for times: those come by `step`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_idle = threading.Event()
        self.waits_for_times = True

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.waits_for_times or timeout == 0:
            return super().select(timeout)
        if found := super().select(0):
            return found
        self.is_idle.set()
        found = super().select(None)
        self.is_idle.clear()
        return found


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts what it is asked for."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._now = 0.0
        self._goes_since: float | None = monotonic()
        self._idle = _Selector()
        super().__init__(self._idle)

    @override
    def time(self) -> float:
        return self._now + (0.0 if self._goes_since is None else monotonic() - self._goes_since)

    def hold(self) -> None:
        """Let time stand still, from another thread."""
        self._now, self._goes_since = self.time(), None
        self._idle.waits_for_times = False

    def release(self) -> None:
        """Let it go on."""
        self._goes_since = monotonic()
        self._idle.waits_for_times = True

    def step(self) -> None:
        """Move it on, from another thread, and return when all that was due is done."""
        self._now += STEP
        self._idle.is_idle.clear()
        super().call_soon_threadsafe(_nothing)
        if not self._idle.is_idle.wait(PATIENCE):
            raise TimeoutError(f"expected the event loop to have nothing to do within {PATIENCE:g} s, got something")

    def profile_other(self, _: FrameType, event: str, called: object) -> None:
        """Count the statements of the embedded log's thread, as `threading.setprofile` tells of its calls."""
        if event == "c_call" and isinstance(getattr(called, "__self__", None), sqlite3.Connection | sqlite3.Cursor):
            self.counts["statements"] += 1

    @override
    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        self.counts["callbacks"] += 1
        return super().call_soon(callback, *args, context=context)

    @override
    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        self.counts["timers"] += 1
        return super().call_at(when, callback, *args, context=context)

    @override
    def create_task(self, *args: Any, **options: Any) -> asyncio.Task[Any]:
        self.counts["tasks"] += 1
        return super().create_task(*args, **options)

    @override
    def create_future(self) -> asyncio.Future[Any]:
        self.counts["futures"] += 1
        return super().create_future()

    def profile(self, frame: FrameType, event: str, called: object) -> None:
        """Count a call in this thread, as `sys.setprofile` tells of it. A coroutine that goes on is called again."""
        code = frame.f_code
        if event in {"call", "c_call"} and code.co_filename not in UNCOUNTED:
            self.counts["calls"] += 1
        if event == "call" and code.co_filename.startswith(OURS) and "<" not in code.co_name:
            self.counts["calls of ours"] += 1  # without comprehensions, which are calls until 3.11
        elif event == "c_call":
            assert isinstance(called, BuiltinFunctionType)
            if called.__name__ in SYSTEM_CALLS and called.__self__ is not self._ssock:  # type: ignore[attr-defined]
                self.counts["system calls"] += 1


def _nothing() -> None:
    pass


class _Driver:
    """The sender and the destination, in a thread."""

    def __init__(self, loop: CountingLoop, gateway: Gateway, lines: Path) -> None:
        self._loop = loop
        self._gateway = gateway
        self._lines = lines
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self._delivering: socket.socket | None = None
        self.port: int = self._listener.getsockname()[1]
        self.found: dict[str, float] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._drive()
        except BaseException as error:  # noqa: BLE001 - it is told by the thread that joins
            self.error = error
        finally:
            self._loop.release()
            with suppress(RuntimeError):  # closed: the gateway couldn't start
                self._loop.call_soon_threadsafe(self._gateway.stop)

    def _drive(self) -> None:
        with socket.create_connection(("127.0.0.1", self._ingress_port()), timeout=PATIENCE) as sender:
            for number in range(WARM_UP):
                self._one(sender, number)
            counts: list[Mapping[str, int]] = []
            for number in range(WARM_UP, WARM_UP + EVENTS):
                before = self._loop.counts.copy()
                self._one(sender, number)
                counts.append({name: count - before[name] for name, count in self._loop.counts.copy().items()})
            gc.collect()
            objects = len(gc.get_objects())
            for number in range(WARM_UP + EVENTS, WARM_UP + 2 * EVENTS):
                self._one(sender, number)
            gc.collect()
            self.found["objects kept"] = (len(gc.get_objects()) - objects) / EVENTS
        for name in sorted(self._loop.counts):
            values = [each.get(name, 0) for each in counts]
            self.found[name] = median(values)
            self.found[f"{name}, mean"] = mean(values)

    def _ingress_port(self) -> int:
        until = monotonic() + PATIENCE
        while monotonic() < until:
            for line in self._lines.read_bytes().splitlines():
                if b'"event":"listening"' in line and line.endswith(b"}"):
                    return int(orjson.loads(line)["ingress"].rpartition(":")[2])
            sleep(POLL)
        raise TimeoutError(f"expected it to listen within {PATIENCE:g} s")

    def _one(self, sender: socket.socket, number: int) -> None:
        sender.sendall(_request(number))
        _read(sender, b"202")
        if self._delivering is None:
            self._delivering, _ = self._listener.accept()
            self._delivering.settimeout(PATIENCE)
            self._loop.hold()
        _read(self._delivering, b"/hook")
        self._delivering.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        self._loop.step()


def _request(number: int) -> bytes:
    body = orjson.dumps({"ref": "refs/heads/main", "number": 100_000 + number, "filler": "x" * 1000})
    signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    return (
        f"POST /in/github HTTP/1.1\r\nHost: gateway.test\r\nContent-Type: application/json\r\n"
        f"X-GitHub-Delivery: {100_000 + number}\r\nX-GitHub-Event: push\r\nX-Hub-Signature-256: sha256={signature}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _read(connection: socket.socket, expected: bytes) -> None:
    """Read a message whose first line has this in it."""
    received = b""
    while HEAD_END not in received:
        received += _some(connection)
    head, _, rest = received.partition(HEAD_END)
    if expected not in head.partition(b"\r\n")[0]:
        raise RuntimeError(f"expected a message with {expected!r}, got {head!r}")
    length = 0
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    while len(rest) < length:
        rest += _some(connection)


def _some(connection: socket.socket) -> bytes:
    if found := connection.recv(65536):
        return found
    raise RuntimeError("expected a message, got the end of the connection")


def main(log: str, prefix: str = "gateway.") -> None:
    with tempfile.TemporaryDirectory() as folder:
        rules, output = Path(folder, "routes.yaml"), Path(folder, "lines")
        flags = {"rules": str(rules), "log": log, "topic_prefix": prefix, "dev": "true"}
        flags |= dict.fromkeys(("listen", "admin"), "127.0.0.1:0")
        with output.open("wb") as file:
            lines = logs.configure(json=True, descriptor=file.fileno())
            gateway = Gateway(from_sources(flags, {}), logs.get_logger("gateway"))
            with asyncio.Runner(loop_factory=CountingLoop) as runner:
                loop = runner.get_loop()
                assert isinstance(loop, CountingLoop)
                driver = _Driver(loop, gateway, output)
                rules.write_text(RULES % (SECRET, driver.port))
                thread = threading.Thread(target=driver.run, name="driver")
                gc.disable()
                thread.start()
                threading.setprofile(loop.profile_other)
                sys.setprofile(loop.profile)
                runner.run(gateway.run())
                sys.setprofile(None)
                thread.join()
            lines.close()
        if driver.error is not None:
            sys.exit(f"{driver.error!r}\n{output.read_text()[-2000:]}")
    print(orjson.dumps(driver.found, option=orjson.OPT_INDENT_2).decode())  # noqa: T201 - that is what it is for


if __name__ == "__main__":
    main(*sys.argv[1:])
