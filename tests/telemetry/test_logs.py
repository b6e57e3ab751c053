"""The log's lines: what they look like, what they survive, and that a stalled reader holds nobody up."""

import errno
import fcntl
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from gateway.telemetry.logs import Lines, configure, get_logger, raise_site, traceback_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Whatever is configured here is gone for the next test."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for descriptor in (reader, writer):
        try:
            os.close(descriptor)
        except OSError:
            continue


def logged(pipe: tuple[int, int], say: Callable[[], object], *, level: int = logging.INFO, as_json: bool = True) -> str:
    """Return what is written while `say` logs."""
    reader, writer = pipe
    lines = configure(json=as_json, level=level, descriptor=writer)
    say()
    lines.close()
    os.close(writer)
    with os.fdopen(os.dup(reader), "rb") as stream:
        return stream.read().decode()


def only(text: str) -> Any:
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text)


def test_a_traceback_on_a_terminal_shows_no_variables() -> None:
    def fail() -> None:
        password = "hunter" + "2" * 7
        raise ValueError(len(password))

    reader, writer = pty.openpty()
    lines = configure(json=False, descriptor=writer)
    try:
        fail()
    except ValueError:
        get_logger("x").exception("went_wrong")
    lines.close()
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.close(writer)
    assert "went_wrong" in shown
    assert "ValueError" in shown
    assert "raise ValueError(len(password))" in shown
    assert "hunter2222222" not in shown


def test_a_line_is_one_json_object_with_its_time_first(pipe: tuple[int, int]) -> None:
    before = datetime.now(UTC)
    text = logged(pipe, lambda: get_logger("gateway.ingress").info("request_finished", status=202, type="a\nb"))
    line = only(text)
    assert [*line] == ["timestamp", "level", "event", "logger", "status", "type"]
    assert line["timestamp"].endswith("Z")
    assert before <= datetime.fromisoformat(line.pop("timestamp")) <= datetime.now(UTC)
    assert line == {
        "level": "info",
        "event": "request_finished",
        "logger": "gateway.ingress",
        "status": 202,
        "type": "a\nb",
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\xff", "b'\\xff'"),
        (2**70, str(2**70)),
        ("\udcff", "\\udcff"),
        ({1: 2}, "{1: 2}"),
        (ValueError("x"), "ValueError('x')"),
    ],
)
def test_values_unknown_to_json_become_text(pipe: tuple[int, int], value: object, shown: str) -> None:
    assert only(logged(pipe, lambda: get_logger("x").info("happened", value=value)))["value"] == shown


def test_an_exception_has_its_trace_in_the_same_line(pipe: tuple[int, int]) -> None:
    def fail() -> None:
        try:
            _ = 1 // 0
        except ZeroDivisionError as error:
            get_logger("x").error("request_failed", exc_info=error)

    line = only(logged(pipe, fail))
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ZeroDivisionError: integer division or modulo by zero")


def test_traces_of_libraries_are_few_and_their_other_lines_are_all_there(pipe: tuple[int, int]) -> None:
    """A protocol that fails has one written by asyncio for each connection that comes."""

    def fail() -> None:
        for n in range(50):
            try:
                _ = 1 // 0
            except ZeroDivisionError:
                logging.getLogger("asyncio").exception("Fatal error")
            logging.getLogger("asyncio").warning("lost %d", n)

    found = [line["event"] for line in map(json.loads, logged(pipe, fail).splitlines())]
    assert found.count("Fatal error") in {1, 2}  # a second may begin meanwhile
    assert [event for event in found if event != "Fatal error"] == [f"lost {n}" for n in range(50)]


def test_a_trace_of_a_library_hides_none_of_another_kind_and_says_how_many_there_were(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 100.1, 100.2, 101.5])
    monkeypatch.setattr("gateway.telemetry.logs.monotonic", lambda: next(times))

    def fail() -> None:
        for error in (ValueError, ValueError, KeyError, ValueError):
            logging.getLogger("asyncio").error("failed", exc_info=error())

    lines = [json.loads(line) for line in logged(pipe, fail).splitlines()]
    assert [(line["exception"].split()[-1], line.get("count")) for line in lines] == [
        ("ValueError", None),
        ("KeyError", None),
        ("ValueError", 2),
    ]


def test_a_traceback_has_each_errors_place_and_not_its_message() -> None:
    def fail() -> None:
        try:
            try:
                "\ud800".encode()
            except UnicodeEncodeError:
                raise KeyError("s3cret" + "key") from None
        except KeyError as error:
            error.add_note("s3cret" + "note")
            raise ExceptionGroup("s3cret" + "group", [ValueError("s3cret" + "value"), error]) from error

    with pytest.raises(ExceptionGroup) as caught:
        fail()
    caught.value.exceptions[0].__context__ = caught.value  # a circle
    told = traceback_of(caught.value)
    assert [line for line in told.splitlines() if not line.startswith((" ", "Traceback"))] == [
        "KeyError",
        "",
        "ValueError",
        "",
        "ExceptionGroup",
    ]
    assert told.count("Traceback (most recent call last):") == 3
    assert "in fail" in told
    assert not re.search("s3cret(key|note|group|value)", told)
    assert raise_site(caught.value) == f"{__name__}:{fail.__code__.co_firstlineno + 8}"
    assert raise_site(KeyError()) == "nowhere"


def test_levels_below_the_configured_one_are_silent(pipe: tuple[int, int]) -> None:
    def say() -> None:
        get_logger("x").debug("attempt_failed")
        get_logger("x").warning("heard")

    assert only(logged(pipe, say))["event"] == "heard"


def test_the_standard_librarys_warnings_come_in_the_same_stream(pipe: tuple[int, int]) -> None:
    def say() -> None:
        logging.getLogger("aiokafka").info("silent")
        logging.getLogger("aiokafka").warning("lost %s", "broker 1")
        logging.getLogger("aiohttp.server").error("bad %d", "format")

    kept = sys.stderr
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - where logging tells of a bad format string
    try:
        line = only(logged(pipe, say))
    finally:
        sys.stderr.close()
        sys.stderr = kept
    assert (line["level"], line["event"], line["logger"]) == ("warning", "lost broker 1", "aiokafka")


def test_a_terminal_gets_text(pipe: tuple[int, int]) -> None:
    text = logged(pipe, lambda: get_logger("x").info("listening", ingress="http://127.0.0.1:8080"), as_json=False)
    assert "listening" in text
    assert "ingress=http://127.0.0.1:8080" in text
    assert "\x1b" not in text
    assert text.endswith("\n")


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\n12:00 [info] forged \x9b31m \u202egnp.exe\x7f"


def test_senders_texts_cannot_control_a_terminal_or_begin_a_line(pipe: tuple[int, int]) -> None:
    def say() -> None:
        logger = get_logger("x")
        logger.info("request_finished", type=HOSTILE, types=[HOSTILE], about={"a": HOSTILE})
        logger.info("request_finished", type="né")
        logging.getLogger("aiohttp").warning(HOSTILE)

    text = logged(pipe, say, as_json=False)
    assert text.count("\n") == 3
    assert text.replace("\n", "").isprintable()
    assert "type=né" in text
    assert r"\x1b]0;owned\x07" in text
    assert r"\u202egnp" in text


# C0, DEL, C1, the separators of lines and paragraphs, and the embeddings, overrides and isolates of direction
# (https://www.unicode.org/reports/tr9/#Directional_Formatting_Characters).
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_each_control_of_a_terminal_or_of_direction_is_escaped(pipe: tuple[int, int], *, as_json: bool) -> None:
    def say() -> None:
        logger = get_logger("x")
        for char in CONTROLS:
            logger.info("request_finished", type=f"a{char}b", types=[f"a{char}b"], lone=f"\udcff{char}b")

    text = logged(pipe, say, as_json=as_json)
    assert text.count("\n") == len(CONTROLS)
    assert not set(CONTROLS) & set(text.replace("\n", ""))
    if as_json:
        assert [json.loads(line)["type"] for line in text.splitlines()] == [f"a{char}b" for char in CONTROLS]


def refuse() -> None:
    raise ValueError(HOSTILE)


def test_a_trace_keeps_its_lines_on_a_terminal_and_has_no_orders_in_it(pipe: tuple[int, int]) -> None:
    def say() -> None:
        try:
            refuse()
        except ValueError as error:
            get_logger("x").error("request_failed", exception=traceback_of(error), exc_info=error)

    text = logged(pipe, say, as_json=False)
    assert "\nTraceback" in text
    assert "\x1b" not in text
    assert "\x9b" not in text


def test_json_has_nothing_in_it_that_a_terminal_takes_for_an_order(pipe: tuple[int, int]) -> None:
    text = logged(
        pipe, lambda: get_logger("x").info("request_finished", type=HOSTILE, other="né", odd="\udcff" + HOSTILE)
    )
    assert text.removesuffix("\n").isprintable()
    line = only(text)
    assert line["type"] == HOSTILE
    assert line["other"] == "né"


def test_a_bound_logger_can_be_captured(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    lines = configure(json=True, descriptor=writer)
    logger = get_logger("x")
    with structlog.testing.capture_logs() as captured:
        logger.info("happened", id=1)
    lines.close()
    assert captured == [{"event": "happened", "log_level": "info", "logger": "x", "id": 1}]


def test_a_stalled_reader_holds_nobody_up_and_sees_how_much_it_lost(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    line = b"x" * 1023 + b"\n"
    lines = Lines(writer, max_waiting=10)
    for _ in range(room // len(line) + 1):  # more than the pipe takes: the thread is stuck in its write
        lines.info(line)
    until(lambda: not lines._waiting)
    for _ in range(15):
        lines.info(line)
    assert len(lines._waiting) == 10
    received: list[bytes] = []
    thread = threading.Thread(target=drain, args=(reader, received))
    thread.start()
    lines.close()
    os.close(writer)
    thread.join(5)
    whole = b"".join(received).splitlines()
    told = json.loads(whole[-1])
    assert (told["event"], told["count"]) == ("log_lines_dropped", 5)
    assert len(whole) == room // len(line) + 1 + 10 + 1


def test_a_reader_that_never_comes_back_does_not_hold_up_the_end(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    lines = Lines(writer)
    lines.info(b"x" * (room + 1))
    began = time.monotonic()
    lines.close(timeout=0.05)
    assert time.monotonic() - began < 1


def test_a_closed_pipe_is_no_failure(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = Lines(writer)
    os.close(reader)
    lines.info(b"x\n")
    lines.close()
    lines.info(b"y\n")


def test_nobody_goes_on_writing_to_a_closed_pipe(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    dropped: list[int] = []
    lines = Lines(writer)
    lines.on_dropped = dropped.append
    os.close(reader)
    lines.info(b"x\n")
    until(lambda: not lines._thread.is_alive())
    lines.info(b"y\n")
    assert (sum(dropped), len(lines._waiting)) == (2, 0)
    lines.close()


def test_a_disk_that_was_full_takes_lines_again_and_is_told_how_many_are_missing(tmp_path: Path) -> None:
    full, room = os.open("/dev/full", os.O_WRONLY), os.open(tmp_path / "lines", os.O_RDWR | os.O_CREAT)
    dropped: list[int] = []
    lines = Lines(full)
    lines.on_dropped = dropped.append
    for _ in range(3):
        lines.info(b"lost\n")
    until(lambda: sum(dropped) == 3)
    os.dup2(room, full)
    until(lambda: bool(os.fstat(room).st_size))  # nobody has to log anything for that
    lines.info(b'{"event":"later"}\n')
    lines.close()
    told, later = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert (told["event"], told["count"], later["event"]) == ("log_lines_dropped", 3, "later")
    os.close(full)
    os.close(room)


def test_a_line_that_a_full_disk_has_cut_is_ended_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write, is_full = os.open(tmp_path / "lines", os.O_RDWR | os.O_CREAT), os.write, [False]

    def limited(descriptor: int, data: memoryview) -> int:
        if descriptor != file or len(data) < 10:
            return write(descriptor, data)
        if is_full[0]:
            raise OSError(errno.ENOSPC, "no space left on device")
        is_full[0] = True
        return write(descriptor, data[:9])

    monkeypatch.setattr(os, "write", limited)  # a disk's room can't be set to a byte
    lines = Lines(file)
    dropped: list[int] = []
    lines.on_dropped = dropped.append
    lines.info(b"whole\ncut here\nlost\n")
    until(lambda: sum(dropped) == 2)
    monkeypatch.undo()
    lines.info(b"next\n")
    lines.close()
    os.close(file)
    found = (tmp_path / "lines").read_text().splitlines()
    assert found[:2] == ["whole", "cut"]
    assert {each[:4] for each in found[2:]} == {"next", '{"ti'}


def test_once_nobody_reads_any_more_all_lines_count_as_dropped(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    dropped: list[int] = []
    lines = Lines(writer)
    lines.on_dropped = dropped.append
    os.close(reader)
    lines.info(b"x\n")
    lines._thread.join(5)
    lines.info(b"y\n")
    assert (sum(dropped), len(lines._waiting)) == (2, 0)


def test_a_pipe_that_does_not_block_is_waited_for(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    lines = Lines(writer)
    lines.info(b"x" * (3 * room))
    received: list[bytes] = []
    thread = threading.Thread(target=drain, args=(reader, received))
    thread.start()
    lines.close()
    os.close(writer)
    thread.join(5)
    assert len(b"".join(received)) == 3 * room


def drain(reader: int, received: list[bytes]) -> None:
    while chunk := os.read(reader, 65536):
        received.append(chunk)


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_lines_of_several_processes_are_whole_and_say_whose_they_are(tmp_path: Path) -> None:
    """Without the lock, lines of more than 4 KiB are mixed up in a pipe."""
    program = (
        "import sys; from pathlib import Path; from gateway.telemetry.logs import configure, get_logger\n"
        "lines = configure(json=True, descriptor=1, process=int(sys.argv[1]), lock=Path(sys.argv[2]))\n"
        "logger = get_logger('gateway')\n"
        "sys.stderr.write('x'); sys.stderr.flush(); sys.stdin.readline()\n"
        "for number in range(400): logger.info('happened', number=number, text='x' * 9000)\n"
        "lines.close(20)"
    )
    reader, writer = os.pipe()
    with ExitStack() as stack:
        writing = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, str(number), str(tmp_path / "lines.lock")],
                    stdin=subprocess.PIPE,
                    stdout=writer,
                    stderr=subprocess.PIPE,
                    cwd=ROOT,
                )
            )
            for number in range(2)
        ]
        os.close(writer)
        for each in writing:
            assert each.stderr is not None
            assert each.stderr.read(1) == b"x"
        for each in writing:
            assert each.stdin is not None
            each.stdin.close()  # both begin
        with os.fdopen(reader, "rb") as together:
            found = [orjson.loads(line) for line in together]
    assert [each.returncode for each in writing] == [0, 0]
    for process in range(2):
        assert [line["number"] for line in found if line["process"] == process] == [*range(400)]
