"""The gateway's log: one JSON object per line on stdout, or readable text on a terminal.

Each request and each delivery has one canonical line with a past-tense name (`request_finished`) and its ids.
Bodies, signatures and query strings are never logged. Text from a sender (a type, an id) is escaped, so that it can't
control a terminal or begin a line.

A line costs its caller about 4 µs, and never waits for the reader of stdout: `Lines` passes it to a thread.
"""

import atexit
import errno
import fcntl
import logging
import os
import re
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor
from typing_extensions import override

from gateway.telemetry.log_throttle import LogThrottle

FLUSH_INTERVAL = 0.1  # The thread wakes up at most 10 times a second, as each time it interrupts the event loop.
MAX_WAITING = 20_000  # About 5 MB of lines; if the reader is further behind, the newest ones are dropped.
GONE = (errno.EPIPE, errno.EBADF)  # Of a write: no later one can succeed.
FLUSH_TIMEOUT = 1.0  # A blocked stdout must not delay the end of the process.


def configure(
    *,
    json: bool,
    level: int = logging.INFO,
    descriptor: int | None = None,
    process: int | None = None,
    lock: Path | None = None,
) -> "Lines":
    """Send structlog's and the standard library's log to stdout (or another file descriptor), once per process.

    The standard library's loggers (aiohttp, aiokafka) are included from WARNING on. Returns the sink, which is flushed
    when the process ends. With `process`, its number, each line has it; with `lock`, a file, other processes may write
    to the same descriptor.
    """
    descriptor = sys.stdout.fileno() if descriptor is None else descriptor
    lines = Lines(descriptor, json=json, lock=lock)
    _of_all_lines.clear()
    if process is not None:
        _of_all_lines["process"] = process
    structlog.configure(
        processors=[render_json] if json else _console(colors=os.isatty(descriptor)),
        wrapper_class=_lean_logger(level),
        logger_factory=lambda *_: lines,
        # A cached logger defeats capture_logs(); `get_logger` binds at once instead, which is as fast.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_Forward()]
    root.setLevel(max(level, logging.WARNING))
    atexit.register(lines.close)
    return lines


def get_logger(name: str) -> FilteringBoundLogger:
    """Return a logger that adds its name to each line. Call it after `configure`, whose settings it keeps.

    It is bound once: structlog's lazy loggers bind with each line, which takes 1.4 µs.
    """
    logger: FilteringBoundLogger = structlog.get_logger().bind(logger=name)
    return logger


def _lean_logger(level: int) -> type[FilteringBoundLogger]:
    """Return structlog's filtering logger, with an `info` that builds one dictionary per line instead of four.

    Each request and each delivery is logged with it.
    """
    base = structlog.make_filtering_bound_logger(level)
    return base if level > logging.INFO else type("LeanLogger", (base,), {"info": _info})


def _info(self: Any, event: str, *args: object, **fields: object) -> None:  # noqa: ANN401 - structlog's untyped inside
    if self._processors[0] is not render_json or args or "exc_info" in fields:
        self._proxy_to_logger("info", event, *args, **fields)
        return
    line = {"timestamp": datetime.now(UTC), "level": "info", "event": event, **self._context, **fields}
    self._logger.info(_rendered(line))


def render_json(_: object, level: str, fields: EventDict) -> bytes:
    """Render a line, as structlog's last processor. Values that JSON can't represent are written as their `repr`."""
    line: dict[str, Any] = {"timestamp": datetime.now(UTC), "level": level, "event": fields.pop("event")}
    exc_info = fields.pop("exc_info", None)
    line.update(fields)
    if exc_info:
        line["exception"] = structlog.processors.ExceptionRenderer()(None, level, {"exc_info": exc_info})["exception"]
    return _rendered(line)


def printable(text: str, *, keep: str = "") -> str:
    """Escape a string's control characters, except those to keep, and bytes that weren't UTF-8."""
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() or char in keep else _escaped(char) for char in text])


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode()


_of_all_lines: dict[str, int] = {}
"""Fields of every line of this process."""


def _rendered(line: dict[str, Any]) -> bytes:
    line.update(_of_all_lines)
    try:
        rendered = orjson.dumps(line, default=repr, option=LINE)
    except orjson.JSONEncodeError:  # lone surrogates, integers of more than 64 bits, keys that aren't text
        rendered = orjson.dumps({str(key): _plain(value) for key, value in line.items()}, option=LINE)
    return printable_json(rendered)


def printable_json(text: bytes) -> bytes:
    """Escape what JSON allows, though it controls a terminal or changes the direction of text."""
    if text.isascii() and b"\x7f" not in text:
        return text
    return _CONTROLS.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), text)


# DEL, C1, the separators of lines and paragraphs, and the controls of text direction, in UTF-8.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8-\xae]|\xe2\x81[\xa6-\xa9]")


def traceback_of(error: BaseException) -> str:
    """Return an error's traceback, preceded by those of its causes, without the errors' messages.

    The message of a KeyError or a UnicodeEncodeError contains the data: a piece of a body, perhaps.
    """
    return "\n\n".join(_traces(error, set()))


def raise_site(error: BaseException) -> str:
    """Return the module and line at which an error was raised."""
    site = "nowhere"
    for frame, line in traceback.walk_tb(error.__traceback__):
        site = f"{frame.f_globals.get('__name__', '?')}:{line}"
    return site


def _traces(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for each in (before, *parts):
        if each is not None and id(each) not in seen:
            yield from _traces(each, seen)
    frames = "".join(traceback.format_tb(error.__traceback__))
    yield f"Traceback (most recent call last):\n{frames}{type(error).__qualname__}"


LINE = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


class Lines:
    """The sink of log lines: `info(line)` and its aliases return at once, and a thread writes the queued lines.

    A log that can't be written must not stop the gateway: if the reader of stdout stalls, at most `max_waiting` lines
    are kept, and the others are dropped, as are those of a write that fails, as on a full disk; how many is logged as
    soon as lines are written again. If the reader is gone (EPIPE, EBADF), all lines are dropped. A process that is
    killed loses the lines of its last 100 ms.
    """

    def __init__(
        self, descriptor: int, *, json: bool = True, max_waiting: int = MAX_WAITING, lock: Path | None = None
    ) -> None:
        self.on_dropped: Callable[[int], object] = lambda _: None
        """Called with each number of lines that were dropped, in any thread."""
        self._descriptor = descriptor
        self._lock = None if lock is None else lock.open("wb")
        self._json = json
        self._max_waiting = max_waiting
        self._waiting: deque[bytes] = deque()
        self._refused = 0
        """Lines for which there was no room."""
        self._lost = 0
        """Lines of writes that failed."""
        self._told = 0
        """How many of these a line has told of."""
        self._is_torn = False
        """Whether the last write ended within a line."""
        self._has_lines = threading.Event()
        self._closing = threading.Event()
        # Daemonic, because a blocked write can't be interrupted.
        self._thread = threading.Thread(target=self._run, name="log-lines", daemon=True)
        self._thread.start()

    def info(self, line: bytes) -> None:
        if len(self._waiting) >= self._max_waiting:
            self._refused += 1
            self.on_dropped(1)
            return
        self._waiting.append(line)
        # Invariant: the thread clears the flag before it takes lines, so a line added after that sets it again.
        if not self._has_lines.is_set():
            self._has_lines.set()

    debug = warning = error = critical = exception = log = msg = info

    def close(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Write the queued lines, within `timeout` seconds, and stop. Later lines are lost."""
        self._closing.set()
        self._has_lines.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            self._has_lines.wait()
            self._has_lines.clear()
            is_last = self._closing.is_set()
            chunk = b"".join([self._waiting.popleft() for _ in range(len(self._waiting))])
            untold = self._refused + self._lost - self._told
            written = self._write(chunk)
            lost = chunk.count(b"\n", written or 0)
            if lost:
                self._lost += lost
                self.on_dropped(lost)
            elif untold and self._write(line := self._dropped_line(untold)) == len(line):
                self._told += untold
            if written is None:
                self._max_waiting = 0
            if written is None or is_last:
                break
            if self._told < self._refused + self._lost:  # though there may be no more lines
                self._has_lines.set()
            self._closing.wait(FLUSH_INTERVAL)
        if self._lock is not None:
            self._lock.close()

    def _dropped_line(self, count: int) -> bytes:
        if self._json:
            return render_json(None, "warning", {"event": "log_lines_dropped", "count": count, "logger": __name__})
        return b"log_lines_dropped count=%d\n" % count

    def _write(self, chunk: bytes) -> int | None:
        """Write lines, and return how many bytes of them; None if nobody will ever read any.

        What several processes write to one pipe is mixed up within lines from 4 KiB on: so only one writes at a time.
        """
        if self._lock is None:
            return self._write_now(chunk)
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            return self._write_now(chunk)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def _write_now(self, chunk: bytes) -> int | None:
        if self._is_torn and chunk:
            ended = self._write_all(b"\n")
            if ended != 1:
                return None if ended is None else 0
            self._is_torn = False
        written = self._write_all(chunk)
        self._is_torn |= bool(written) and not chunk.endswith(b"\n", 0, written)
        return written

    def _write_all(self, chunk: bytes) -> int | None:
        left = memoryview(chunk)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another program has set the terminal or pipe that we share to non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                return None if error.errno in GONE else len(chunk) - len(left)
        return len(chunk)


class _Forward(logging.Handler):
    """Passes the standard library's log records to structlog, so that there is one stream of lines.

    Of those with a trace, each place and kind of error has one a second, with the `count` since its last one: an error
    of a connection may come once for each that somebody opens.
    """

    def __init__(self) -> None:
        super().__init__()
        self._throttle = LogThrottle()

    @override
    def emit(self, record: logging.LogRecord) -> None:
        more: dict[str, int] = {}
        if record.exc_info:
            place = record.name, record.pathname, record.lineno, record.exc_info[0]
            count = self._throttle.count(place, monotonic())
            if not count:
                return
            more = {"count": count} if count > 1 else {}
        try:
            get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info or None, **more)
        except Exception:  # noqa: BLE001 - a caller's bad format string must not become the caller's failure
            self.handleError(record)


def _console(*, colors: bool) -> list[Processor]:
    # By default, rich would print tracebacks with the local variables of each frame, including bodies and secrets.
    render = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)

    def render_text(logger: object, level: str, fields: EventDict) -> bytes:
        fields.update(_of_all_lines)
        for key, value in fields.items():
            # Other values are shown as their `repr`, which has its own escapes.
            if isinstance(value, str):
                fields[key] = printable(value, keep="\n\t" if key == "exception" else "")
        return f"{render(logger, level, fields)}\n".encode("utf-8", "backslashreplace")

    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
        structlog.processors.format_exc_info,
        render_text,
    ]


def _plain(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()
