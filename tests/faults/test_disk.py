"""The embedded log on a disk that is full, and on one that a crash has left in disorder."""

import asyncio
import multiprocessing
import os
import random
import re
import resource
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Self

import pytest
from typing_extensions import override

from gateway.ops.send import ask_status
from tests.acceptance.conftest import LogPlace
from tests.faults.scenario import Scenario, Table
from tests.faults.sqlite_wal import end_of_commits
from tests.gateway_process import GatewayProcess
from tests.load import post
from tests.run_seeds import drawn

pytestmark = pytest.mark.rotated(share=1 / 12, group="faults")

Fill = Callable[[Path, GatewayProcess], None]

ROOM = 256 * 1024
"""Bytes that are left when a disk is about to be full."""
TMPFS_MIB = 32
LARGE = bytes(400_000)
FULL = pytest.mark.full


@pytest.mark.timeout(120)
async def test_on_a_full_disk_no_more_is_acknowledged_than_there_is_room_for(
    disk: "Disk", folder: Path, table: Table, *, is_full: bool
) -> None:
    place = LogPlace(url=f"sqlite:///{disk.folder / 'gateway.db'}", prefix="gateway.")
    seconds = 10 if is_full else 2
    async with Scenario(f"no space for {seconds} s ({disk.kind})", place, folder, table) as scenario:
        [gateway] = scenario.gateways
        pid = gateway.pid
        async with scenario.load():
            await scenario.acknowledged(100)
            began = time.time()
            with disk.full(gateway):
                await _refused(scenario)
                full = time.time()
                refused_at = min(sent.answered_at for sent in scenario.sender.answers if sent.status == 503)
                await _told_of_refusals(gateway, refused_at)
                await asyncio.sleep(seconds)
                room = time.time()
            await gateway.ready(timeout=5)
            told = await gateway.line("log_available", timeout=5)
            assert seconds <= told["seconds"] < seconds + 5
            assert (await gateway.metrics()).sum("gateway_log_up") == 1
            await scenario.acknowledged(150)
            # Nothing can be committed on a full disk either; but nothing comes then that could be finished.
            scenario.explain(began, time.time(), uncommitted=full - began)
        await scenario.settle()
        answers = [sent for sent in scenario.sender.answers if sent.at > began and sent.answered_at < room]
        stored = [scenario.sender.body(sent.number) for sent in answers if sent.status == 202]
        assert sum(map(len, stored)) <= ROOM, scenario.story()
        refused = [sent for sent in answers if sent.status != 202]
        assert refused
        assert {sent.status for sent in refused} == {503}
        assert all(b"\r\nretry-after: " in sent.head.lower() for sent in refused)
        assert (gateway.is_running, gateway.pid) == (True, pid)


@pytest.mark.timeout(60)
async def test_a_nearly_full_disk_takes_small_events_and_reports_large_ones(folder: Path) -> None:
    """By turns: no small event that is stored hides that large ones are refused."""
    rules = "version: 1\nsources: {shop: {verify: {scheme: none}}}\n"
    async with GatewayProcess(folder, rules=rules, log=f"sqlite:///{folder / 'gateway.db'}") as gateway:

        async def sent(body: bytes) -> int:
            head = f"POST /in/shop HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            return (await post(gateway.port, head.encode() + body))[0]

        assert await sent(b"{}") == 202
        wal = (folder / "gateway.db-wal").stat().st_size
        before = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (wal + len(LARGE), resource.RLIM_INFINITY))
        assert await sent(LARGE) == 503
        line = await gateway.line("log_unavailable", timeout=5)
        assert re.search(r"gateway\.db: expected room for .+, got it for \d+: .+ \(SQLITE_", line["error"])
        for _ in range(3):
            assert [await sent(b"{}"), await sent(LARGE), await sent(b"{}")] == [202, 503, 202]
            await asyncio.sleep(0.6)  # a look at the log, at least
            assert (await gateway.metrics()).sum("gateway_log_up") == 0
            answer = await gateway.readiness()
            assert answer["ready"]
            assert any(note.startswith("log: ") for note in answer["notes"])
            status = await ask_status(f"127.0.0.1:{gateway.admin_port}")
            assert "SQLITE_" in status["log"]["reason"]
        assert not gateway.lines("log_available")
        assert len(gateway.lines("log_unavailable")) == 1
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, before)
        await gateway.line("log_available", timeout=5)
        assert await gateway.readiness() == {"ready": True, "reasons": []}
        assert (await gateway.metrics()).sum("gateway_log_up") == 1
        assert await sent(LARGE) == 202


@pytest.mark.timeout(240)
async def test_acknowledged_events_survive_kills_that_tear_the_wals_tail(
    embedded_place: LogPlace, folder: Path, table: Table, *, is_full: bool
) -> None:
    """Killed at random moments; then what stands behind the last commit frame is cut, overwritten or added to."""
    rounds = 2 if is_full else 1
    chance = random.Random(drawn())
    wal = Path(f"{embedded_place.path}-wal")
    loop = asyncio.get_running_loop()
    # In a process of its own: in a thread it would take the interpreter from the sinks, which then note requests late.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        async with Scenario(f"torn {rounds * len(TEARS)} times", embedded_place, folder, table, rate=400) as scenario:
            [gateway] = scenario.gateways
            async with scenario.load():
                for tear in TEARS * rounds:
                    await scenario.acknowledged(chance.randrange(50, 700))
                    scenario.kill(gateway)
                    tear(wal, await loop.run_in_executor(pool, end_of_commits, wal), chance)
                    await gateway.start()
            await scenario.settle()


def cut_behind(wal: Path, end: int, _: random.Random) -> None:
    """Leave out what was never committed."""
    os.truncate(wal, end)


def half_a_frame(wal: Path, end: int, chance: random.Random) -> None:
    """Begin one more frame, as like the last one as may be, and lose power."""
    content = wal.read_bytes()[:end]
    _write(wal, end, content[-8216:][: chance.randrange(1, 8216)])


def frame_of_another_sum(wal: Path, end: int, _: random.Random) -> None:
    """Repeat the last commit frame, whose checksum doesn't go on from itself."""
    _write(wal, end, wal.read_bytes()[:end][-8216:])


def zeros(wal: Path, end: int, chance: random.Random) -> None:
    """Let the file be longer than what was written, as a file system may leave it."""
    _write(wal, end, bytes(chance.randrange(1, 100_000)))


def garbage(wal: Path, end: int, chance: random.Random) -> None:
    _write(wal, end, chance.randbytes(chance.randrange(1, 100_000)))


TEARS = [cut_behind, half_a_frame, frame_of_another_sum, zeros, garbage]


def _write(wal: Path, at: int, content: bytes) -> None:
    with wal.open("r+b") as file:
        file.seek(at)
        file.write(content)


MOVED = {
    "gateway.db": (
        "it isn't there any more: it was moved or deleted",
        "expected the file to which gateway.db-wal belongs, got none",
    ),
    "gateway.db-wal": (
        "gateway.db-wal isn't there any more: it was moved or deleted",
        "expected gateway.db-wal with what was stored last, got none",
    ),
}
"""What the gateway says of a file that is moved away, and what the next one says that is started without it."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", MOVED)
async def test_a_file_that_is_moved_under_its_gateway_ends_it_and_has_all_that_was_acknowledged(
    embedded_place: LogPlace, folder: Path, table: Table, name: str
) -> None:
    title = "file moved" if name == "gateway.db" else "WAL moved"
    async with Scenario(title, embedded_place, folder, table) as scenario:
        [gateway] = scenario.gateways
        file = embedded_place.path.with_name(name)
        assert file.exists()
        old = file.with_name("old")
        why, refusal = MOVED[name]
        async with scenario.load():
            await scenario.acknowledged(150)
            at = time.time()
            file.rename(old)
            await _refused(scenario)
            assert await gateway.ended(timeout=15) == 1
            line = gateway.lines("log_lost")[-1]
            assert datetime.fromisoformat(line["timestamp"]).timestamp() < at + 1.5
            ending = f"can no longer be used, and nothing more is written to it: {why}"
            assert ending in line["error"]
            assert ending in gateway.story().splitlines()[-2]  # what the command itself says, on stderr
            gateway.spawn()
            assert await gateway.ended(timeout=15) == 2
            assert refusal in gateway.story()
            old.rename(file)
            await gateway.start()
            scenario.explain(at, time.time(), uncommitted=0)
            await scenario.acknowledged(100)
        await scenario.settle()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "how", ["deleted", "emptied", pytest.param("halved", marks=FULL), pytest.param("replaced", marks=FULL)]
)
async def test_a_wal_that_loses_acknowledged_events_under_load_ends_its_gateway_and_no_other_goes_on_without_them(
    folder: Path, how: str
) -> None:
    """Nothing brings those events back. But nobody takes what is left for all that there was."""
    rules = "version: 1\nsources: {shop: {verify: {scheme: none}}}\n"
    wal = folder / "gateway.db-wal"
    statuses: list[int] = []

    async def send() -> None:
        body = bytes(3000)
        head = f"POST /in/shop HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        while gateway.is_running:
            with suppress(OSError, IndexError, asyncio.IncompleteReadError):  # its end
                statuses.append((await post(gateway.port, head.encode() + body))[0])

    async with GatewayProcess(folder, rules=rules, log=f"sqlite:///{folder / 'gateway.db'}") as gateway:
        senders = [asyncio.create_task(send()) for _ in range(8)]
        while statuses.count(202) < 200 or not 50 < _frames_to_move(folder) < 900:  # noqa: ASYNC110 - what nothing tells
            await asyncio.sleep(0.01)
        match how:
            case "deleted":
                wal.unlink()
            case "emptied":
                os.truncate(wal, 0)
            case "halved":
                os.truncate(wal, wal.stat().st_size // 2)
            case _:
                wal.with_name("copy").write_bytes(wal.read_bytes()[: 50 * 8216])
                wal.with_name("copy").rename(wal)
        assert await gateway.ended(timeout=15) == 1
        await asyncio.wait(senders)
        (line,) = gateway.lines("log_lost")
        assert "gateway.db can no longer be used, and nothing more is written to it: gateway.db-wal " in line["error"]
        assert set(statuses) <= {202, 503}
        left = _contents(folder)
        gateway.spawn()
        assert await gateway.ended(timeout=15) == 2
        assert "gateway.db: expected gateway.db-wal with what was stored last, got " in gateway.story()
        assert _contents(folder) == left


def _frames_to_move(folder: Path) -> int:
    """Return how many of the WAL's frames aren't in the file yet. It begins to move them when there are a thousand."""
    index = (folder / "gateway.db-shm").read_bytes()
    frames, moved = struct.unpack_from("=16xI76xI", index)
    return int(frames - moved)


def _contents(folder: Path) -> dict[str, bytes]:
    """Return the log's files, but for that of its lock."""
    return {file.name: file.read_bytes() for file in folder.glob("gateway.db*") if file.suffix != ".lock"}


async def _told_of_refusals(gateway: GatewayProcess, since: float) -> None:
    """Hold that who asks, who scrapes and who reads the log are told within a second, and why."""
    line = await gateway.line("log_unavailable", timeout=5)
    assert datetime.fromisoformat(line["timestamp"]).timestamp() < since + 1
    assert re.search(r"gateway\.db: .+ \(SQLITE_(FULL|IOERR_WRITE)\)", line["error"])
    await gateway.until("gateway_log_up", 0, timeout=1)
    # What is written into the WAL from its beginning needs no room: between two checkpoints an append may fit again.
    until = time.monotonic() + 1
    while (answer := await gateway.readiness())["ready"]:
        assert time.monotonic() < until
        await asyncio.sleep(0.02)
    assert any(re.match(r"log: .*SQLITE_", reason) for reason in answer["reasons"])
    assert len(gateway.lines("log_unavailable")) <= 1 + len(gateway.lines("log_available"))


async def _refused(scenario: Scenario, *, timeout: float = 20.0) -> None:
    """Wait until the gateway refuses."""
    until = time.monotonic() + timeout
    while not scenario.sender.statuses()[503]:
        assert time.monotonic() < until, f"expected a 503 in {timeout:g} s\n{scenario.story()}"
        await asyncio.sleep(0.05)


class Disk:
    """A place whose space is taken away. By a limit on the size of the process's files, which every Linux allows."""

    kind = "RLIMIT_FSIZE"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def full(self, gateway: GatewayProcess) -> Iterator[None]:
        largest = max(file.stat().st_size for file in self.folder.iterdir())
        before = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (largest + ROOM, resource.RLIM_INFINITY))
        yield
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, before)


class SmallDisk(Disk):
    """By a file that fills a small file system (ENOSPC, as operators meet it); to mount one takes root."""

    kind = "tmpfs"

    def __enter__(self) -> Self:
        options = f"size={TMPFS_MIB}m"
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)], capture_output=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"needs to mount a tmpfs (root): {mount.stderr.decode().splitlines()[:1]}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.folder)], check=True)

    @override
    @contextmanager
    def full(self, gateway: GatewayProcess) -> Iterator[None]:
        assert gateway.is_running
        ballast = self.folder / "ballast"
        left = os.statvfs(self.folder)
        ballast.write_bytes(bytes(left.f_bavail * left.f_bsize - ROOM))
        yield
        ballast.unlink()


@pytest.fixture(params=["limit", pytest.param("tmpfs", marks=pytest.mark.full)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "limit":
        yield Disk(place)
        return
    with SmallDisk(place) as small:
        yield small
