import asyncio
import errno
import fcntl
import gc
import os
import resource
import shutil
import signal
import sqlite3
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import structlog

from gateway.log.base import Assignment, Commit, NewRecord, Partition, Position, Record, TopicSpec
from gateway.log.embedded import backup, file_check, statements, sweep
from gateway.log.embedded import log as log_module
from gateway.log.embedded.backup import back_up
from gateway.log.embedded.consumer import ALL_BUFFER_BYTES, BUFFER_BYTES, Range
from gateway.log.embedded.file import sync
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.embedded.restore import restore
from gateway.log.embedded.statements import DAMAGED_HEADERS, LAST_TOPIC
from gateway.log.embedded.writer import Append
from gateway.log.records import decode_event
from gateway.model import (
    LogLostError,
    LogNearlyFullError,
    LogUnavailableError,
    UndecodableRecordError,
    UsageError,
)

ROOT = Path(__file__).parents[2]
DAY = 86400.0
MIB = 1 << 20
EVENTS = TopicSpec(name="events", partitions=6, retention=7 * DAY)
CONTROL = TopicSpec(name="control", partitions=1, retention=None, compacted=True)


class Clock:
    """A clock that is set by hand; the log's own goes on by the machine's monotonic clock beside it."""

    def __init__(self, time: float = 1_000_000.0) -> None:
        self.time = time

    def __call__(self) -> float:
        return self.time


class Silent:
    """A listener that commits nothing."""

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        pass

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the contract's
        return {}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@asynccontextmanager
async def opened(path: Path, *, owner: bool = True, append_timeout: float = 5.0) -> AsyncIterator[EmbeddedLog]:
    log = await EmbeddedLog.open(path, owner=owner, append_timeout=append_timeout)
    try:
        if owner:
            await log.create([EVENTS, CONTROL])
        yield log
    finally:
        await log.close()


async def append(log: EmbeddedLog, value: bytes, *, topic: str = "events", key: bytes = b"k") -> Position:
    return await log.append(topic, key=key, value=value, headers=[])


async def stored(log: EmbeddedLog, topic: str = "events") -> list[Record]:
    return [record async for batch in log.scan(Partition(topic, 0), 0, 1 << 60) for record in batch]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def modes(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mode & 0o777 for file in directory.glob("*.db*") if file.suffix != ".lock"}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file's write lock, as another process may."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def locked_as_an_index(path: Path) -> Iterator[None]:
    """Lock a file's name as who has an index open: without a pid."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Who may use the file


async def test_a_second_owner_is_refused_and_shown_the_first(path: Path) -> None:
    async with opened(path):
        with pytest.raises(
            LogUnavailableError, match=rf"gateway\.db is in use by another gateway \(pid {os.getpid()}\)"
        ):
            await EmbeddedLog.open(path, owner=True)
    async with opened(path):
        pass


@pytest.mark.parametrize("how", ["link", "link to a folder", "moved", "no lock file", "no lock file, link"])
async def test_a_second_owner_is_refused_by_whatever_name_it_comes(path: Path, tmp_path: Path, how: str) -> None:
    other = tmp_path / "elsewhere" / "other.db"
    other.parent.mkdir()
    async with opened(path) as log:
        await append(log, b"a")
        if "no lock file" in how:
            path.with_name("gateway.db.lock").unlink()
        if how == "link to a folder":
            other.parent.rmdir()
            other.parent.symlink_to(path.parent)
            other = other.with_name("gateway.db")
        elif how == "moved":
            shutil.move(path, other)
        elif "link" in how:
            other.symlink_to(path)
        with pytest.raises(LogUnavailableError, match="is in use by another gateway"):
            await EmbeddedLog.open(path if how == "no lock file" else other, owner=True)
        if how == "moved":
            shutil.move(other, path)


async def test_a_link_to_a_file_that_is_not_there_yet_is_locked_as_the_file(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with opened(link):
        with pytest.raises(LogUnavailableError, match="is in use by another gateway"):
            await EmbeddedLog.open(path, owner=True)


async def test_a_file_of_two_names_is_opened_by_its_owners_alone(path: Path, tmp_path: Path) -> None:
    """SQLite has its WAL beside the name: by the other one, what was stored last is missing."""
    other = tmp_path / "other.db"
    async with opened(path) as log:
        await append(log, b"a")
        other.hardlink_to(path)
        for owner in (True, False):
            with pytest.raises(UsageError, match=r"other\.db: expected a file of one name, got 2 \(hard links\)"):
                await EmbeddedLog.open(other, owner=owner)
        async with opened(path, owner=False) as guest:
            await append(guest, b"b")
    for each in (path, other):
        with pytest.raises(UsageError, match="expected a file of one name"):
            await EmbeddedLog.open(each, owner=True)
    other.unlink()
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"a", b"b"]


@pytest.mark.parametrize("owner", [True, False])
async def test_a_directory_is_refused_as_one_and_nothing_is_left_beside_it(path: Path, *, owner: bool) -> None:
    await asyncio.to_thread(path.mkdir)
    with pytest.raises(UsageError, match=r"gateway\.db: expected an embedded log, got: is a directory$"):
        await EmbeddedLog.open(path, owner=owner)
    assert list(path.parent.iterdir()) == [path]


async def test_an_index_in_use_is_not_called_another_gateways_log(path: Path) -> None:
    told = r"that has written no pid into gateway\.db\.lock: an index is in"
    with locked_as_an_index(path), pytest.raises(LogUnavailableError, match=told):
        await EmbeddedLog.open(path, owner=True)


async def test_a_guest_is_refused_where_the_file_was_moved_under_its_owner(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    async with opened(path):
        shutil.move(path, other)
        with pytest.raises(LogUnavailableError, match=r"other\.db is in use by another gateway \(by another name\)"):
            await EmbeddedLog.open(other, owner=False)
        shutil.move(other, path)


async def test_a_guest_goes_beside_an_owner_whose_lock_file_was_deleted(path: Path) -> None:
    async with opened(path):
        path.with_name("gateway.db.lock").unlink()
        async with opened(path, owner=False) as guest:
            await append(guest, b"a")


async def test_a_new_file_that_cannot_be_written_yet_may_be_tried_again(path: Path) -> None:
    with locked(path), pytest.raises(LogUnavailableError, match="expected an embedded log, got: database is locked"):
        await EmbeddedLog.open(path, owner=True, append_timeout=0.1)
    async with opened(path):
        pass


async def test_a_guest_appends_and_reads_but_joins_no_group(path: Path) -> None:
    async with opened(path) as log, opened(path, owner=False) as guest:
        await append(guest, b"from the guest")
        assert [record.value for record in await stored(log)] == [b"from the guest"]
        with pytest.raises(UsageError, match="expected its owner to join router"):
            await guest.consume(group="router", topics=["events"], listener=Silent())


async def test_a_guest_makes_no_file(path: Path) -> None:
    with pytest.raises(UsageError, match=r"gateway\.db: expected an embedded log"):
        await EmbeddedLog.open(path, owner=False)
    assert contents(path.parent) == {}


async def test_a_second_member_of_a_group_is_refused_while_the_first_is_there(path: Path) -> None:
    async with opened(path) as log:
        first = await log.consume(group="router", topics=["events"], listener=Silent())
        with pytest.raises(UsageError, match="expected one member of router, got a second one"):
            await log.consume(group="router", topics=["events"], listener=Silent())
        await first.close()
        await (await log.consume(group="router", topics=["events"], listener=Silent())).close()


@pytest.fixture
def letter(path: Path) -> Path:
    path.write_text("This is a letter. " * 1000)
    return path


async def test_a_file_that_is_no_database_is_refused(letter: Path) -> None:
    with pytest.raises(UsageError, match=r"gateway\.db: expected an embedded log, got: file is not a database"):
        await EmbeddedLog.open(letter, owner=True)


async def test_the_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE addresses (name TEXT)")
    before = contents(path.parent)["gateway.db"]
    for owner in (True, False):
        with pytest.raises(UsageError, match="got another program's database"):
            await EmbeddedLog.open(path, owner=owner)
    assert contents(path.parent)["gateway.db"] == before


async def test_a_backup_is_the_log_as_of_that_moment(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with opened(path) as log:
        await log.append("events", key=b"k", value=b"\x00\xff", headers=[("h", b"\xfe")])
        await log.seed("g", {Partition("events", 0): Commit(1, b"\x02")})
        size = await asyncio.to_thread(back_up, path, copy)
        await log.append("events", key=b"k", value=b"later", headers=[])
    assert (copy.stat().st_size, copy.stat().st_mode & 0o777) == (size, 0o600)
    assert [name for name in contents(tmp_path) if name.startswith("copy")] == ["copy.db"]
    async with opened(copy) as log:
        (record,) = [record async for batch in log.scan(Partition("events", 0), 0, 9) for record in batch]
        assert (record.key, record.value, record.headers) == (b"k", b"\x00\xff", (("h", b"\xfe"),))
        assert await log.committed("g", "events") == {0: Commit(1, b"\x02")}
        assert not await log.check([EVENTS, CONTROL])
        assert (await log.append("events", key=b"k", value=b"", headers=[])).offset == 1


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_backup_to_a_link_is_written_to_its_target(path: Path, tmp_path: Path, *, is_there: bool) -> None:
    folder, link = tmp_path / "elsewhere", tmp_path / "latest"
    folder.mkdir()
    link.symlink_to("elsewhere/copy.db")
    async with opened(path) as log:
        await log.append("events", key=b"k", value=b"a", headers=[])
        if is_there:
            await asyncio.to_thread(back_up, path, folder / "copy.db")
            await log.append("events", key=b"k", value=b"b", headers=[])
        size = await asyncio.to_thread(back_up, path, link)
    assert (link.readlink(), [each.name for each in folder.iterdir()]) == (Path("elsewhere/copy.db"), ["copy.db"])
    assert (folder / "copy.db").stat().st_size == size
    async with opened(folder / "copy.db") as log:
        assert [record.value for record in await stored(log)] == [b"a", b"b"][: 1 + is_there]


async def test_a_failed_backup_leaves_the_previous_one(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with opened(path):
        await asyncio.to_thread(back_up, path, copy)
        before, limit = contents(tmp_path)["copy.db"], resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(UsageError, match="expected room for a copy"):
                await asyncio.to_thread(back_up, path, copy)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path)["copy.db"] == before
    assert not [name for name in contents(tmp_path) if name.endswith(".part")]


@pytest.mark.parametrize("name", ["gateway.db", "gateway.db-wal", "gateway.db-shm", "gateway.db.lock", "hard", "soft"])
@pytest.mark.parametrize("is_linked", [False, True])
async def test_a_backup_never_replaces_a_file_of_the_log(
    path: Path, tmp_path: Path, name: str, *, is_linked: bool
) -> None:
    async with opened(path) as log:
        await append(log, b"first")
        (path.parent / "hard").hardlink_to(path)
        (path.parent / "soft").symlink_to(path)
        alias = tmp_path / "alias.db"
        alias.symlink_to(path)
        before = {each: (path.parent / each).stat().st_ino for each in contents(path.parent)}
        with pytest.raises(UsageError, match=f"{name}: expected a file of its own for the copy"):
            await asyncio.to_thread(back_up, alias if is_linked else path, path.parent / ".." / path.parent.name / name)
        assert {each: (path.parent / each).stat().st_ino for each in contents(path.parent)} == before
        (path.parent / "hard").unlink()
        await append(log, b"second")
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"first", b"second"]


async def test_a_backup_never_replaces_a_log_in_use(path: Path, tmp_path: Path) -> None:
    """Who restores that way has exchanged the two names."""
    backup = tmp_path / "backup.db"
    async with opened(path) as log:
        await append(log, b"a")
        await asyncio.to_thread(back_up, path, backup)
        with pytest.raises(UsageError, match=r"gateway\.db: expected a file of its own for the copy, got a log in use"):
            await asyncio.to_thread(back_up, backup, path)


async def test_simultaneous_backups_are_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy takes a moment, and nothing public stops it halfway.
    copy = tmp_path / "copy.db"
    begun: list[Path] = []

    def sync_beside_another(written: Path) -> None:
        begun.append(written)
        if len(begun) == 1:
            back_up(path, copy)
        sync(written)

    async with opened(path) as log:
        await append(log, b"a")
        monkeypatch.setattr(backup, "sync", sync_beside_another)
        await asyncio.to_thread(back_up, path, copy)
    assert len(begun) > 2
    async with opened(copy) as log:
        assert [record.value for record in await stored(log)] == [b"a"]
    assert not [name for name in contents(tmp_path) if name.endswith(".part")]


async def test_a_killed_backups_leftovers_are_deleted_later(path: Path, tmp_path: Path) -> None:
    left, under_way, other = [tmp_path / name for name in ("copy.db.x.part", "copy.db.y.part", "other.db.z.part")]
    for each in (left, under_way, other):
        each.touch()
    for each in (left, other):
        os.utime(each, (time.time() - 2 * 3600.0,) * 2)
    async with opened(path):
        await asyncio.to_thread(back_up, path, tmp_path / "copy.db")
    assert [each.exists() for each in (left, under_way, other)] == [False, True, True]


@pytest.mark.parametrize("is_another_programs", [False, True])
def test_only_a_log_is_copied(path: Path, tmp_path: Path, *, is_another_programs: bool) -> None:
    if is_another_programs:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE addresses (name TEXT)")
    with pytest.raises(UsageError, match="expected an embedded log"):
        back_up(path, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
    assert path.exists() == is_another_programs


async def test_a_log_of_another_version_is_refused(path: Path) -> None:
    async with opened(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="expected an embedded log of version 1, got 99"):
        await EmbeddedLog.open(path, owner=True)


async def test_a_directory_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        await EmbeddedLog.open(tmp_path / "nowhere" / "gateway.db", owner=True)


async def test_an_incomplete_new_file_is_recreated(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    async with opened(path) as log:
        await append(log, b"a")


async def test_the_files_are_readable_by_their_user_alone(path: Path) -> None:
    async with opened(path) as log:
        await append(log, b"a")
        assert modes(path.parent) == {"gateway.db": 0o600, "gateway.db-wal": 0o600, "gateway.db-shm": 0o600}


# A copy in the place of the log


async def a_log_and_its_backup(path: Path, copy: Path) -> None:
    """Have the copy lack what was stored last, which is in the WAL alone: the owner was killed."""
    async with opened(path) as log:
        await append(log, b"copied")
        await asyncio.to_thread(back_up, path, copy)
        await append(log, b"later")
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{path}{suffix}.killed")
    for suffix in ("", "-wal"):
        shutil.move(f"{path}{suffix}.killed", f"{path}{suffix}")


async def test_a_restored_backup_is_the_log_and_the_old_one_is_kept(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy.db"
    copy.parent.mkdir()
    await a_log_and_its_backup(path, copy)
    size, before, stray = await asyncio.to_thread(restore, path, copy)
    assert before is not None
    assert stray is None
    found, copied = contents_of_files(tmp_path), contents(copy.parent)["copy.db"]
    assert (found["gateway.db"], size) == (copied, len(copied))
    assert found.keys() - {"gateway.db.lock"} == {"gateway.db", before.name, f"{before.name}-wal"}
    assert modes(path.parent)["gateway.db"] == 0o600
    for file, values in ((path, [b"copied"]), (before, [b"copied", b"later"])):
        async with opened(file) as log:
            assert [record.value for record in await stored(log)] == values


async def test_nothing_is_restored_while_a_gateway_has_the_log(path: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.db", tmp_path / "other.db"
    async with opened(path) as log:
        await append(log, b"a")
        await asyncio.to_thread(back_up, path, copy)
        with pytest.raises(LogUnavailableError, match=rf"in use by another gateway \(pid {os.getpid()}\)"):
            await asyncio.to_thread(restore, path, copy)
        shutil.move(path, other)
        with pytest.raises(LogUnavailableError, match=r"other\.db is in use by a gateway, by another name"):
            await asyncio.to_thread(restore, other, copy)
        shutil.move(other, path)
        await append(log, b"b")


@pytest.mark.parametrize("what", ["missing", "letter", "application_id", "user_version", "damaged", "in use"])
async def test_an_incomplete_backup_is_not_restored(path: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "folder" / "copy.db"
    copy.parent.mkdir()
    await a_log_and_its_backup(path, copy)
    if what == "missing":
        shutil.move(copy, tmp_path / "folder" / "else.db")
    elif what == "letter":
        shutil.copy(__file__, copy)
    elif what == "damaged":
        damage(copy)
    elif what == "in use":
        shutil.copy(path, copy)
        shutil.copy(f"{path}-wal", f"{copy}-wal")
    else:
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute(f"PRAGMA {what} = 7")
    before = contents_of_files(tmp_path)
    with pytest.raises(UsageError, match=r"copy\.db: expected a copy"):
        await asyncio.to_thread(restore, path, copy)
    assert contents_of_files(tmp_path) == before
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"copied", b"later"]


def damage(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(3 * 8192)
        file.write(b"\xff" * 8192)


def contents_of_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


async def test_the_logs_own_file_is_no_backup(path: Path) -> None:
    async with opened(path):
        pass
    with pytest.raises(UsageError, match="got the log's own"):
        await asyncio.to_thread(restore, path, path)


async def test_a_restore_checks_a_backups_structure_but_not_its_content(path: Path, tmp_path: Path) -> None:
    """SQLite has no checksums: docs/operations.md promises none."""
    copy = tmp_path / "copy.db"
    await a_log_and_its_backup(path, copy)
    assert copy.read_bytes().count(b"copied") == 1
    copy.write_bytes(copy.read_bytes().replace(b"copied", b"c0pied"))
    await asyncio.to_thread(restore, path, copy)
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"c0pied"]


async def test_a_half_done_restore_is_refused_by_the_next_owner_and_resumes(path: Path, tmp_path: Path) -> None:
    """It has renamed the file, and not yet the WAL."""
    copy = tmp_path / "copy.db"
    await a_log_and_its_backup(path, copy)
    shutil.move(path, tmp_path / "gateway.db.before-killed")
    with pytest.raises(UsageError, match="or run `gateway restore` with a backup"):
        await EmbeddedLog.open(path, owner=True)
    _, before, stray = await asyncio.to_thread(restore, path, copy)
    assert before is None
    assert stray is not None
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"copied"]


RESTORE = """
import os, sys
from pathlib import Path
from gateway.log.embedded import restore as module

step = 0

def killed_at(event, arguments):
    global step
    if event in ("os.link", "os.rename", "os.remove") and sys.argv[2].rpartition("/")[0] in str(arguments):
        step += 1
        if step == int(sys.argv[1]):
            os._exit(9)

module.delete_leftovers = lambda _: None
if sys.argv[4] == "without hard links":
    def link(*_):
        raise OSError(95, "operation not supported")
    os.link = link
sys.addaudithook(killed_at)
module.restore(Path(sys.argv[2]), Path(sys.argv[3]))
"""


async def killed_restore(path: Path, copy: Path, *, before_step: int, links: str) -> bool:
    """Restore in a process that is killed before it gives, changes or removes a name; return whether it was."""
    arguments = [str(before_step), str(path), str(copy), links]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", RESTORE, *arguments, cwd=ROOT)
    code = await process.wait()
    assert code in {0, 9}
    return code == 9


@pytest.mark.parametrize("links", ["with hard links", "without hard links"])
@pytest.mark.parametrize("is_closed", [True, False], ids=["of a log that was closed", "of a log that was killed"])
async def test_a_restore_that_is_killed_never_leaves_an_empty_log_or_half_of_one(
    path: Path, tmp_path: Path, *, is_closed: bool, links: str
) -> None:
    copy, folder = tmp_path / "copies" / "copy.db", tmp_path / "as it was"
    copy.parent.mkdir()
    await a_log_and_its_backup(path, copy)
    if is_closed:
        async with opened(path):
            pass
    folder.mkdir()
    for name in contents_of_files(tmp_path):
        shutil.copy(tmp_path / name, folder)
    old, new = [b"copied", b"later"], [b"copied"]
    for step in range(1, 10):
        here = tmp_path / f"step {step}"
        shutil.copytree(folder, here)
        file = here / path.name
        if not await killed_restore(file, copy, before_step=step, links=links):
            break
        seen = here.parent / f"seen {step}"
        shutil.copytree(here, seen)  # since opening it may change it
        is_copy = file.read_bytes() == copy.read_bytes()
        if file.stat().st_nlink > 1:
            with pytest.raises(UsageError, match=r"expected a file of one name, got 2"):
                await EmbeddedLog.open(file, owner=True)
        elif is_copy and any(wal.stat().st_size for wal in here.glob("gateway.db-wal")):
            with pytest.raises(UsageError, match="gateway restore"):
                await EmbeddedLog.open(file, owner=True)
        else:
            assert await values_of(seen / path.name) == (new if is_copy else old), f"step {step}"
        stray = (await asyncio.to_thread(restore, file, copy)).stray
        assert await values_of(file) == new, f"step {step}"
        if stray is not None:  # its file has the name that the killed one gave it
            [kept] = [each for each in here.glob("*.before-*") if each.suffix != ".instead" and "-wal" not in each.name]
            kept.rename(stray.with_name(stray.name.removesuffix("-wal")))
        kept_files = [each for each in here.glob("*.before-*") if "-wal" not in each.name]
        assert any([await values_of(each) == old for each in kept_files]), f"step {step}"
    assert step > 2, "expected several steps at which it can be killed"


async def values_of(path: Path) -> list[bytes]:
    async with opened(path) as log:
        return [record.value for record in await stored(log)]


async def test_two_restores_in_a_second_keep_both_logs(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    await a_log_and_its_backup(path, copy)
    kept = []
    for value in (b"second", b"third"):
        kept.append((await asyncio.to_thread(restore, path, copy)).before)
        async with opened(path) as log:
            await append(log, value)
    assert kept[0] is not None
    assert kept[1] is not None
    assert await values_of(kept[0]) == [b"copied", b"later"]
    assert await values_of(kept[1]) == [b"copied", b"second"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose files are another user's")
async def test_what_root_restores_on_a_new_machine_is_of_the_user_who_has_the_folder(tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy.db", tmp_path / "var"
    await a_log_and_its_backup(tmp_path / "gateway.db", copy)
    folder.mkdir()
    os.chown(folder, 1234, 1235)
    await asyncio.to_thread(restore, folder / "gateway.db", copy)
    async with opened(folder / "gateway.db"):  # as `gateway migrate` has it open
        owners = {each.name: (each.stat().st_uid, each.stat().st_gid) for each in folder.iterdir()}
    assert {"gateway.db", "gateway.db.lock", "gateway.db-wal"} <= owners.keys()
    assert set(owners.values()) == {(1234, 1235)}


async def test_a_lock_that_cant_be_opened_is_named(path: Path) -> None:
    path.with_name("gateway.db.lock").mkdir()
    with pytest.raises(UsageError, match=r"expected an embedded log, got: is a directory \(.*gateway\.db\.lock\)"):
        await EmbeddedLog.open(path, owner=True)


async def test_a_restore_to_a_directory_leaves_no_lock(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    await a_log_and_its_backup(tmp_path / "other.db", copy)
    await asyncio.to_thread(path.mkdir)
    with pytest.raises(UsageError, match=r"gateway\.db: expected an embedded log, got: is a directory$"):
        await asyncio.to_thread(restore, path, copy)
    assert not path.with_name("gateway.db.lock").exists()


async def test_without_room_a_restore_changes_nothing(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    await a_log_and_its_backup(path, copy)
    before, limit = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UsageError, match=r"expected room for .*copy\.db, got: file too large"):
            await asyncio.to_thread(restore, path, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before


async def test_a_restore_that_fails_lets_an_empty_log_begin_only_where_there_was_none(
    path: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "copy.db"
    damaged.write_bytes(b"x" * 8192)

    def refused() -> None:
        with pytest.raises(UsageError, match=r"copy\.db: expected a copy of a log, got: file is not a database"):
            restore(path, damaged)

    await asyncio.to_thread(refused)
    await (await EmbeddedLog.open(path, owner=True)).close()
    await asyncio.to_thread(moved, path)
    await asyncio.to_thread(refused)
    with pytest.raises(UsageError, match=r"expected the file that gateway\.db\.lock was made for, got none"):
        await EmbeddedLog.open(path, owner=True)


# A file that is taken away


def moved(path: Path) -> None:
    path.rename(path.with_name("old.db"))


def deleted(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    path.with_name("copy.db").rename(path)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def cut(path: Path) -> None:
    os.truncate(path, 5 * 8192)


def overwritten(path: Path) -> None:
    """As `cp copy.db gateway.db` does."""
    shutil.copyfile(path.with_name("copy.db"), path)


def wal_deleted(path: Path) -> None:
    path.with_name("gateway.db-wal").unlink()


def wal_emptied(path: Path) -> None:
    os.truncate(path.with_name("gateway.db-wal"), 0)


def wal_moved(path: Path) -> None:
    path.with_name("gateway.db-wal").rename(path.with_name("old.db-wal"))


def wal_cut(path: Path) -> None:
    """By a byte of what was stored last."""
    wal = path.with_name("gateway.db-wal")
    os.truncate(wal, wal.stat().st_size - 1)


def wal_replaced(path: Path) -> None:
    wal = path.with_name("gateway.db-wal")
    wal.with_name("copy.db-wal").write_bytes(wal.read_bytes())
    wal.with_name("copy.db-wal").rename(wal)


def wal_overwritten(path: Path) -> None:
    """By another log's, as long as it was."""
    wal = path.with_name("gateway.db-wal")
    with wal.open("r+b") as file:
        file.write(os.urandom(wal.stat().st_size))


def index_deleted(path: Path) -> None:
    path.with_name("gateway.db-shm").unlink()


def folder_moved(path: Path) -> None:
    path.parent.rename(path.parent.with_name(f"{path.parent.name}-old"))


TAKEN: dict[Callable[[Path], None], str] = {
    moved: "it isn't there any more: it was moved or deleted",
    deleted: "it isn't there any more: it was moved or deleted",
    replaced: "it is another file now: it was replaced",
    emptied: "it has 0 bytes, and had more",
    cut: "it has 40960 bytes, and had more",
    overwritten: "another file was copied over it",
    wal_deleted: "gateway.db-wal isn't there any more",
    wal_emptied: "gateway.db-wal has 0 bytes",
    wal_moved: "gateway.db-wal isn't there any more",
    wal_cut: "gateway.db-wal has [0-9]+ bytes, and not all",
    wal_replaced: "gateway.db-wal is another file now: it was replaced",
    wal_overwritten: "gateway.db-wal hasn't the content that was written",
    index_deleted: "gateway.db-shm isn't there any more",
    folder_moved: "it isn't there any more",
}


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
async def test_nothing_is_acknowledged_once_the_file_was_taken_away(
    path: Path, tmp_path: Path, take: Callable[[Path], None]
) -> None:
    path = tmp_path / "folder" / "gateway.db"
    path.parent.mkdir()
    async with opened(path) as log:
        await asyncio.gather(*[append(log, bytes(10_000)) for _ in range(50)])
        await asyncio.to_thread(back_up, path, path.with_name("copy.db"))
        log._file.writer.execute("PRAGMA wal_checkpoint").fetchall()
        for _ in range(100):  # More frames in the WAL than the file has pages.
            await append(log, b"before")
        await log.ping()
        await asyncio.to_thread(take, path)
        with pytest.raises(
            LogUnavailableError,
            match=rf"gateway\.db can no longer be used, and nothing more is written to it: {TAKEN[take]}",
        ):
            await append(log, b"after")
        for call in (append(log, b"after"), log.ping(), log.bounds("events"), log.check([])):
            with pytest.raises(LogLostError, match="can no longer be used"):
                await call


@pytest.mark.parametrize("take", [moved, deleted], ids=lambda take: take.__name__)
async def test_no_empty_log_is_begun_in_the_place_of_one_that_was_taken_away(
    path: Path, take: Callable[[Path], None]
) -> None:
    """A supervisor restarts the gateway in a second, and what an empty log takes is lost once the file is back."""
    async with opened(path) as log:
        await append(log, b"a")
    whole = contents(path.parent)["gateway.db"]
    take(path)
    before = contents(path.parent)
    told = r"gateway\.db: expected the file that gateway\.db\.lock was made for, got none: it was moved or deleted"
    for _ in range(2):
        with pytest.raises(UsageError, match=told):
            await EmbeddedLog.open(path, owner=True)
        assert contents(path.parent) == before
    await asyncio.to_thread(path.write_bytes, whole)
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"a"]


async def test_an_operator_may_begin_an_empty_log_where_one_was(path: Path) -> None:
    async with opened(path) as log:
        await append(log, b"a")
    deleted(path)
    path.with_name("gateway.db.lock").unlink()
    async with opened(path) as log:
        assert not await stored(log)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
async def test_a_first_start_that_could_not_make_the_file_may_be_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    open_file = os.open

    def failing(name: Any, flags: int, mode: int = 0o777, **others: Any) -> int:
        if Path(name) == path and flags & os.O_CREAT:
            raise OSError(error, os.strerror(error))
        return open_file(name, flags, mode, **others)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises((UsageError, LogUnavailableError), match=os.strerror(error).lower()):
        await EmbeddedLog.open(path, owner=True)
    monkeypatch.undo()
    async with opened(path) as log:
        await append(log, b"a")


async def test_a_ping_reports_a_file_that_was_cut_before_anything_was_appended(path: Path) -> None:
    async with opened(path) as log:
        await asyncio.gather(*[append(log, bytes(10_000)) for _ in range(50)])
    log = await EmbeddedLog.open(path, owner=True)
    try:
        await log.ping()
        cut(path)
        with pytest.raises(LogLostError, match="it has 40960 bytes, and had more"):
            await log.ping()
    finally:
        await log.close()


@pytest.mark.parametrize("owner", [True, False])
async def test_a_file_that_was_cut_is_refused_at_the_start_and_left_as_it_is(path: Path, *, owner: bool) -> None:
    async with opened(path) as log:
        await asyncio.gather(*[append(log, bytes(10_000)) for _ in range(50)])
        log._file.writer.execute("PRAGMA wal_checkpoint").fetchall()
        for _ in range(100):
            await append(log, b"a")
        cut(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"b")
    before = contents(path.parent)
    with pytest.raises(UsageError, match=r"got: it has 40960 bytes, and had more: it was truncated; restore"):
        await EmbeddedLog.open(path, owner=owner)
    assert {name: before[name] for name in ("gateway.db", "gateway.db-wal")}.items() <= contents(path.parent).items()


async def test_a_file_that_is_short_because_its_pages_wait_in_the_wal_is_whole(path: Path) -> None:
    log = await EmbeddedLog.open(path, owner=True)
    await log.create([EVENTS])
    with closing(sqlite3.connect(path)) as reader:  # Nothing behind what it reads is moved.
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM topics").fetchall()
        await asyncio.gather(*[append(log, bytes(10_000)) for _ in range(300)])
        await log.ping()
        copies = {name: path.with_name(f"copy.db{name}") for name in ("", "-wal")}
        for name, copy in copies.items():
            shutil.copyfile(f"{path}{name}", copy)
    await log.close()
    assert copies[""].stat().st_size < 300 * 8192 < copies["-wal"].stat().st_size
    async with opened(copies[""]) as copy_log:
        assert len(await stored(copy_log)) == 300


@pytest.mark.parametrize("where", ["read", "consumer", "write", "append", "poll"])
async def test_a_file_that_is_damaged_is_lost_with_the_first_read_that_finds_it(path: Path, where: str) -> None:
    async with opened(path) as log:
        await asyncio.gather(*[append(log, bytes(10_000)) for _ in range(50)])
    log = await EmbeddedLog.open(path, owner=True)
    try:
        with path.open("r+b") as file:
            file.seek(8192)
            file.write(b"\x99" * (len(contents(path.parent)["gateway.db"]) - 8192))
        if where == "consumer":
            delivered = asyncio.get_running_loop().create_future()
            log.read_soon([Range("events", 0, 50)], delivered.set_result)
            assert await delivered is None
        elif where == "poll":
            await asyncio.to_thread(log._poll_bounds)
        elif where == "append":
            with pytest.raises(LogUnavailableError, match="SQLITE_CORRUPT"):
                await append(log, b"a")
        else:
            work = log.read if where == "read" else log.write
            with pytest.raises(LogLostError, match=r"gateway\.db is damaged: .+ \(SQLITE_CORRUPT"):
                await work(statements.rows, "SELECT json_group_array(length(value)) FROM records")
        for call in (log.ping(), log.topics(), log.ping()):
            with pytest.raises(LogLostError, match=r"gateway\.db is damaged: .+; run `gateway restore` with a backup"):
                await call
    finally:
        await log.close()


async def test_appends_to_a_moved_file_are_not_acknowledged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An fsync takes a moment, and nothing public stops it halfway.
    async with opened(path) as log:
        insert = log._writer._insert

        def insert_and_move(appends: Any) -> Any:
            results = insert(appends)
            moved(path)
            return results

        monkeypatch.setattr(log._writer, "_insert", insert_and_move)
        with pytest.raises(LogUnavailableError, match="can no longer be used"):
            await append(log, b"a")


WAL_TAKEN = (wal_deleted, wal_moved, wal_emptied, wal_cut, wal_replaced, wal_overwritten)


@pytest.mark.parametrize("owner", [True, False])
@pytest.mark.parametrize("take", WAL_TAKEN, ids=lambda take: take.__name__)
async def test_a_wal_that_is_taken_away_in_the_middle_of_a_store_ends_it_and_is_refused_from_then_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[[Path], None], *, owner: bool
) -> None:
    """After a truncation, what is written next makes the WAL as long as it was, with zeros before it."""
    async with opened(path) as log:
        for number in range(30):
            await append(log, b"%d" % number + b"x" * 3000)
        insert = log._writer._insert

        def take_and_insert(appends: Any) -> Any:
            take(path)
            return insert(appends)

        # Between the check before a store and its write there are microseconds, and nothing public stops it there.
        monkeypatch.setattr(log._writer, "_insert", take_and_insert)
        with pytest.raises(
            LogUnavailableError, match=r"can no longer be used, and nothing more is written to it: gateway\.db-wal "
        ):
            await append(log, b"a")
        monkeypatch.undo()
        with pytest.raises(LogLostError, match="can no longer be used"):
            await log.ping()
    before = contents(path.parent)
    with pytest.raises(UsageError, match=r"expected gateway\.db-wal with what was stored last, got "):
        await EmbeddedLog.open(path, owner=owner)
    assert contents(path.parent).items() >= before.items()


@pytest.mark.parametrize("owner", [True, False])
@pytest.mark.parametrize("take", [wal_deleted, wal_moved, wal_emptied, wal_cut], ids=lambda take: take.__name__)
async def test_a_log_without_its_wal_is_refused_and_left_as_it_is(
    path: Path, take: Callable[[Path], None], *, owner: bool
) -> None:
    async with opened(path) as log:
        for number in range(30):
            await append(log, b"%d" % number)
        whole = path.with_name("gateway.db-wal").read_bytes()
        take(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"a")
    before = contents(path.parent)
    got = "none: it was moved or deleted alone" if take in (wal_deleted, wal_moved) else "one of [0-9]+ bytes"
    with pytest.raises(UsageError, match=rf"expected gateway\.db-wal with what was stored last, got {got}"):
        await EmbeddedLog.open(path, owner=owner)
    assert contents(path.parent).items() >= before.items()
    path.with_name("gateway.db-wal").write_bytes(whole)
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"%d" % number for number in range(30)]


async def test_without_a_wal_that_has_nothing_of_its_own_a_log_is_whole(path: Path) -> None:
    """All of it is in the file by then; and without its index nobody knows of it."""
    async with opened(path) as log:
        await append(log, b"a")
        log._file.writer.execute("PRAGMA wal_checkpoint").fetchall()
        wal_deleted(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"b")
    assert path.with_name("gateway.db-shm").exists()
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"a"]
        await append(log, b"c")
        path.with_name("gateway.db-wal").unlink()
        with pytest.raises(LogUnavailableError):
            await append(log, b"d")
    path.with_name("gateway.db-shm").unlink()
    async with opened(path) as log:
        assert [record.value for record in await stored(log)] == [b"a"]


async def test_an_index_from_before_the_wal_was_started_anew_refuses_nothing(path: Path) -> None:
    """A machine that loses its power may keep one: SQLite doesn't sync it."""
    copies = path.with_name("copies")
    copies.mkdir()
    async with opened(path) as log:
        for number in range(30):
            await append(log, b"%d" % number)
        shutil.copyfile(f"{path}-shm", copies / "gateway.db-shm")
        assert log._file.writer.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0
        await append(log, b"last")
        for name in ("gateway.db", "gateway.db-wal"):
            shutil.copyfile(path.with_name(name), copies / name)
    async with opened(copies / "gateway.db") as log:
        assert [record.value for record in await stored(log)] == [*(b"%d" % number for number in range(30)), b"last"]


async def test_a_command_that_closes_the_log_while_another_one_looks_at_it_refuses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path) as log:
        await append(log, b"a")
        copy = path.with_name("copies") / path.name
        copy.parent.mkdir()
        for name in ("", "-wal", "-shm"):
            shutil.copyfile(f"{path}{name}", f"{copy}{name}")

    def closed_meanwhile(_: Path) -> Path:
        with closing(sqlite3.connect(copy)) as other:
            other.execute("SELECT count(*) FROM records").fetchall()
        return copy.with_name(f"{copy.name}-wal")

    monkeypatch.setattr("gateway.log.embedded.file_check.wal_of", closed_meanwhile)
    await asyncio.to_thread(file_check.refuse_shortened_wal, copy, is_owner=False)
    assert not copy.with_name(f"{copy.name}-wal").exists()


async def test_a_ping_reports_a_file_that_was_taken_away_though_nobody_appends(path: Path) -> None:
    async with opened(path) as log:
        await log.ping()
        moved(path)
        with pytest.raises(LogLostError):
            await log.ping()


async def test_a_link_moved_to_another_file_makes_the_log_unavailable(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(path)
    async with opened(link) as log:
        await append(log, b"a")
        other = tmp_path / "other.link"
        other.symlink_to(tmp_path / "other.db")
        (tmp_path / "other.db").touch()
        other.rename(link)
        with pytest.raises(LogUnavailableError, match="it is another file now"):
            await append(log, b"b")


async def test_acknowledged_appends_are_in_a_file_that_is_moved_back(path: Path) -> None:
    async with opened(path) as log:
        await append(log, b"a")
        moved(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"b")
    path.with_name("old.db").rename(path)
    async with opened(path) as log:
        assert [record.value for record in await stored(log)][:1] == [b"a"]


async def test_a_backup_put_over_the_file_stays_intact(path: Path, tmp_path: Path) -> None:
    """Else closing the file would write into it what its WAL has of the one before."""
    async with opened(path) as log:
        await append(log, b"a")
        await asyncio.to_thread(back_up, path, tmp_path / "copy.db")
        await append(log, b"b")
        overwritten(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"c")
    assert contents(tmp_path)["gateway.db"] == contents(tmp_path)["copy.db"]
    with pytest.raises(
        UsageError, match=r"gateway\.db: expected the file to which gateway\.db-wal belongs, got a copy"
    ):
        await EmbeddedLog.open(path, owner=True)


@pytest.mark.parametrize("how", ["moved", "emptied"])
async def test_a_wal_without_its_file_is_not_deleted(path: Path, how: str) -> None:
    async with opened(path) as log:
        await append(log, b"a")
        (moved if how == "moved" else emptied)(path)
        with pytest.raises(LogUnavailableError):
            await append(log, b"b")
    before = contents(path.parent)["gateway.db-wal"]
    assert before
    with pytest.raises(UsageError, match=r"gateway\.db: expected the file to which gateway\.db-wal belongs, got none"):
        await EmbeddedLog.open(path, owner=True)
    assert contents(path.parent)["gateway.db-wal"] == before


async def test_other_processes_can_remove_nothing(path: Path, tmp_path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    await asyncio.gather(*[append(log, bytes(20_000)) for _ in range(300)])
    log._file.writer.execute("PRAGMA wal_checkpoint").fetchall()
    full = len(contents(path.parent)["gateway.db"])
    async with opened(path, owner=False) as guest:
        await append(guest, b"from the guest")
    await append(log, b"a")
    await asyncio.to_thread(back_up, path, tmp_path / "copy.db")
    await append(log, b"b")
    clock.time += 8 * DAY
    await log.sweep()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    assert len(contents(path.parent)["gateway.db"]) < full / 5
    await append(log, b"c")
    await log.ping()
    await log.close()


# Appends


async def test_two_processes_that_append_at_once_never_share_an_offset(path: Path) -> None:
    async with opened(path) as log, opened(path, owner=False) as guest:
        positions = await asyncio.gather(*[append((log, guest)[n % 2], b"%d" % n) for n in range(400)])
        for n in range(400, 450):
            positions.append(await append((log, guest)[n % 2], b"%d" % n))
        by_offset = {record.offset: record.value for record in await stored(log)}
        assert {position.offset: b"%d" % n for n, position in enumerate(positions)} == by_offset
        assert sorted(by_offset) == list(range(450))


async def test_an_offset_of_another_processs_deleted_record_is_not_reused(path: Path) -> None:
    async with opened(path) as log, opened(path, owner=False) as guest:
        await append(log, b"0", topic="control", key=b"a")
        await append(guest, b"1", topic="control", key=b"a")
        await append(guest, b"2", topic="control", key=b"a")
        assert (await append(log, b"3", topic="control", key=b"b")).offset == 3


async def test_a_locked_file_fails_appends_in_time_and_takes_them_again_afterwards(path: Path) -> None:
    async with opened(path, append_timeout=0.2) as log:
        with locked(path):
            started = monotonic()
            taken = asyncio.create_task(append(log, b"taken by the writer"))
            await asyncio.sleep(0.02)
            waiting = asyncio.create_task(append(log, b"waiting"))
            for refused in await asyncio.gather(taken, waiting, log.ping(), return_exceptions=True):
                assert isinstance(refused, LogUnavailableError)
            assert monotonic() - started < 1.0
        await append(log, b"afterwards")
        await log.ping()
        # What failed while it waited for its turn isn't stored later, when its sender has sent it again.
        assert [record.value for record in await stored(log)][-1:] == [b"afterwards"]
        assert b"waiting" not in [record.value for record in await stored(log)]


async def test_appends_that_were_given_up_take_no_memory_while_the_writer_waits(path: Path) -> None:
    async with opened(path, append_timeout=2.0) as log:
        may_go_on = threading.Event()
        busy = asyncio.create_task(log.write(lambda _: may_go_on.wait(10)))
        await asyncio.sleep(0)
        try:
            refused = await asyncio.gather(busy, *[append(log, b"a") for _ in range(100)], return_exceptions=True)
            assert {type(each) for each in refused} == {LogUnavailableError}
            assert log._writer._queue.qsize() == 1
            gc.collect()
            assert not [each for each in gc.get_objects() if isinstance(each, Append)]
        finally:
            may_go_on.set()
        assert (await append(log, b"b")).offset == 0


def test_encoded_headers_take_no_more_memory_than_they_are_long() -> None:
    headers = [("gw_headers", b"x" * 1500), ("ce_id", b"evt_1")]
    tracemalloc.start()
    try:
        encoded = [statements.encode_headers(headers) for _ in range(100)]
        assert tracemalloc.get_traced_memory()[0] < 100 * (len(encoded[0]) + 200)
    finally:
        tracemalloc.stop()


async def test_appends_are_refused_at_once_when_too_many_bytes_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_WAITING_BYTES", 100_000)
    async with opened(path) as log:
        with locked(path):
            appends = [asyncio.create_task(append(log, bytes(997))) for _ in range(120)]
            await asyncio.sleep(0)
            refused = [task for task in appends if task.done()]
            assert len(refused) == 20
            assert all("full queue" in str(task.exception()) for task in refused)
        stored_now = await asyncio.gather(*[task for task in appends if task not in refused])
        assert len(stored_now) == 100
        await asyncio.gather(*[append(log, bytes(997)) for _ in range(100)])


@pytest.mark.parametrize("limit", ["pages", "bytes"])
async def test_a_full_disk_acknowledges_nothing_and_stores_again_when_there_is_room(path: Path, limit: str) -> None:
    """SQLite's own limit (SQLITE_FULL), and writes that the kernel refuses (an I/O error)."""

    @contextmanager
    def full(log: EmbeddedLog) -> Iterator[None]:
        if limit == "pages":
            log._file.writer.execute("PRAGMA max_page_count = 60")
            yield
            log._file.writer.execute("PRAGMA max_page_count = 1000000")
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    async with opened(path) as log:
        acknowledged: dict[int, bytes] = {}
        refused: list[LogUnavailableError] = []
        with full(log):
            for n in range(100):
                value = b"%d" % n + bytes(20_000)
                try:
                    acknowledged[(await append(log, value)).offset] = value
                except LogUnavailableError as error:
                    refused.append(error)
        assert acknowledged
        assert len(refused) > 10
        assert "gateway.db: " in str(refused[0])
        acknowledged[(await append(log, b"room")).offset] = b"room"
        assert {record.offset: record.value for record in await stored(log)} == acknowledged
    async with opened(path) as log:
        assert {record.offset: record.value for record in await stored(log)} == acknowledged


async def test_a_commit_is_stored_in_the_transaction_of_the_appends_beside_it(path: Path) -> None:
    async with opened(path) as log:
        consumer = await log.consume(group="g", topics=["events"], listener=Silent())
        await append(log, b"known")
        statements_run: list[str] = []
        log._file.writer.set_trace_callback(lambda statement: statements_run.append(statement.split()[0]))
        await asyncio.gather(
            append(log, b"a"), consumer.commit({Partition("events", 0): Commit(1, b"\x02")}), append(log, b"b")
        )
        log._file.writer.set_trace_callback(None)
        assert [word for word in statements_run if word in {"BEGIN", "COMMIT"}] == ["BEGIN", "COMMIT"]
        assert await log.committed("g", "events") == {0: Commit(1, b"\x02")}
        assert [record.value for record in await stored(log)] == [b"known", b"a", b"b"]
        await consumer.close()


async def test_a_commit_waits_for_no_append_that_does_not_fit(path: Path) -> None:
    async with opened(path) as log:
        consumer = await log.consume(group="g", topics=["events"], listener=Silent())
        await append(log, b"0")
        await consumer.commit({Partition("events", 0): Commit(0)})
        log._file.writer.execute("PRAGMA max_page_count = 60")
        refused, committed = await asyncio.gather(
            append(log, bytes(1_000_000)), consumer.commit({Partition("events", 0): Commit(1)}), return_exceptions=True
        )
        assert isinstance(refused, LogUnavailableError)
        assert committed is None
        assert await log.committed("g", "events") == {0: Commit(1)}
        log._file.writer.execute("PRAGMA max_page_count = 1000000")
        assert (await append(log, b"1")).offset == 1
        await consumer.close()


async def test_a_commit_to_a_locked_file_fails_in_time(path: Path) -> None:
    async with opened(path, append_timeout=0.2) as log:
        consumer = await log.consume(group="g", topics=["events"], listener=Silent())
        with locked(path):
            started = monotonic()
            with pytest.raises(LogUnavailableError):
                await consumer.commit({Partition("events", 0): Commit(0)})
            assert monotonic() - started < 1.0
        await consumer.commit({Partition("events", 0): Commit(0)})
        await consumer.close()


@pytest.mark.parametrize("limit", ["pages", "bytes", "read-only"])
async def test_a_ping_reports_refused_appends_until_as_much_can_be_written(path: Path, limit: str) -> None:
    """Nobody appends meanwhile: where the gateway isn't ready, its senders are sent elsewhere."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(path) as log:
        await append(log, bytes(20_000))
        execute = log._file.writer.execute
        if limit == "bytes":
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        else:
            execute("PRAGMA query_only = 1" if limit == "read-only" else "PRAGMA max_page_count = 20")
        try:
            with pytest.raises(LogUnavailableError) as refusal:
                await append(log, bytes(500_000))
            for _ in range(2):
                with pytest.raises(
                    LogUnavailableError, match=r"gateway\.db: .+ \(SQLITE_(FULL|IOERR_WRITE|READONLY)\)"
                ):
                    await log.ping()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            execute("PRAGMA query_only = 0")
            execute("PRAGMA max_page_count = 1000000")
        assert "SQLITE_" in str(refusal.value)
        await log.ping()
        assert await asyncio.to_thread(left_over, path) == []
        await append(log, bytes(500_000))
        await log.ping()


NEARLY_FULL = r"gateway\.db: expected room for 10\d{5} bytes, got it for 4096: .+ \(SQLITE_(FULL|IOERR_WRITE)\)"


@pytest.mark.parametrize("limit", ["pages", "bytes"])
async def test_small_appends_that_are_stored_hide_none_of_the_large_ones_that_are_refused(
    path: Path, limit: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(path) as log:
        for _ in range(10):
            await append(log, bytes(20_000))
        try:
            if limit == "bytes":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_250_000, before[1]))
            else:
                log._file.writer.execute("PRAGMA max_page_count = 80")
            for number in range(5):
                with pytest.raises(LogUnavailableError):
                    await append(log, bytes(1_000_000))
                await append(log, b"%d" % number)
                with pytest.raises(LogNearlyFullError, match=NEARLY_FULL):
                    await log.ping()
                await append(log, b"small")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            log._file.writer.execute("PRAGMA max_page_count = 1000000")
        await append(log, bytes(999_999))
        assert log._writer._refused_bytes, "less than what was refused says nothing of it"
        await log.ping()
        assert not log._writer._refused_bytes
        assert await asyncio.to_thread(left_over, path) == []


def left_over(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM notes")]


async def test_an_append_that_succeeds_ends_a_refusal(path: Path) -> None:
    async with opened(path) as log:
        log._file.writer.execute("PRAGMA query_only = 1")
        with pytest.raises(LogUnavailableError):
            await append(log, b"a")
        assert log._writer._refused_bytes
        log._file.writer.execute("PRAGMA query_only = 0")
        await append(log, b"a")
        assert not log._writer._refused_bytes


async def test_a_disk_without_room_for_small_appends_is_full_whatever_was_refused_first(path: Path) -> None:
    async with opened(path) as log:
        log._file.writer.execute("PRAGMA max_page_count = 40")
        with pytest.raises(LogUnavailableError):
            await append(log, bytes(1_000_000))
        with pytest.raises(LogNearlyFullError):
            await log.ping()
        with pytest.raises(LogUnavailableError):
            await fill(log, bytes(3_000))
        with pytest.raises(LogUnavailableError) as refusal:
            await log.ping()
        assert not isinstance(refusal.value, LogNearlyFullError)


async def test_a_ping_writes_after_commits_alone_were_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = sqlite3.OperationalError("disk I/O error")
    failure.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    written: list[int] = []

    def failing(*_: object) -> None:
        raise failure

    async with opened(path) as log:
        consumer = await log.consume(group="g", topics=["events"], listener=Silent())
        with monkeypatch.context() as patch:
            patch.setattr(statements, "commit", failing)
            with pytest.raises(LogUnavailableError):
                await consumer.commit({Partition("events", 0): Commit(0)})
        monkeypatch.setattr(statements, "probe_space", lambda _, size: written.append(size))
        await log.ping()
        await log.ping()
        await consumer.close()
    assert written == [1]


async def fill(log: EmbeddedLog, value: bytes) -> None:
    for _ in range(1_000):
        await append(log, value)


async def test_whether_small_appends_fit_is_not_tried_each_time(path: Path) -> None:
    """What is tried takes room in the WAL, of which there may be little."""
    async with opened(path) as log:
        log._file.writer.execute("PRAGMA max_page_count = 40")
        with pytest.raises(LogUnavailableError):
            await append(log, bytes(1_000_000))
        with pytest.raises(LogNearlyFullError):
            await log.ping()
        size = wal_size(path)
        for _ in range(20):
            with pytest.raises(LogNearlyFullError):
                await log.ping()
        assert wal_size(path) == size


def wal_size(path: Path) -> int:
    return path.with_name("gateway.db-wal").stat().st_size


async def test_a_large_record_for_no_topic_does_not_end_a_refusal(path: Path) -> None:
    async with opened(path) as log:
        log._file.writer.execute("PRAGMA query_only = 1")
        with pytest.raises(LogUnavailableError):
            await append(log, b"large")
        log._file.writer.execute("PRAGMA query_only = 0")
        with pytest.raises(LogUnavailableError, match="expected a topic"):
            await append(log, b"larger", topic="nowhere")
        assert log._writer._refused_bytes


async def test_a_record_for_no_topic_is_no_refusal_of_the_file(path: Path) -> None:
    async with opened(path) as log:
        with pytest.raises(LogUnavailableError, match="expected a topic"):
            await append(log, b"a", topic="nowhere")
        assert not log._writer._refused_bytes


async def test_a_closed_log_is_unavailable(path: Path) -> None:
    async with opened(path) as log:
        pass
    await log.close()
    for call in (append(log, b"a"), log.bounds("events"), log.create([EVENTS]), log.sweep()):
        with pytest.raises(LogUnavailableError, match="closed"):
            await call


# Crashes

APPENDER = """
import asyncio, sys
from pathlib import Path
from gateway.log.base import TopicSpec
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.embedded.restore import restore

async def append(log, worker):
    for n in range(1_000_000):
        value = b"%d-%d-" % (worker, n) + bytes(worker * 100)
        position = await log.append("events", key=b"k", value=value, headers=[("h", b"v")])
        sys.stdout.write(f"{position.offset} {worker}-{n}\\n")
        sys.stdout.flush()

async def main():
    log = await EmbeddedLog.open(Path(sys.argv[1]), owner=True)
    await log.create([TopicSpec(name="events", partitions=1, retention=None)])
    await asyncio.gather(*[append(log, worker) for worker in range(16)])

asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 150, 1500])
async def test_acknowledged_appends_survive_kill_9(path: Path, lines: int) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPENDER, str(path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        ledger = [await process.stdout.readline() for _ in range(lines)]
    finally:
        process.send_signal(signal.SIGKILL)
    ledger += [line for line in (await process.stdout.read()).splitlines(keepends=True) if line.endswith(b"\n")]
    await process.wait()
    acknowledged = dict(line.split() for line in ledger)
    assert len(acknowledged) >= lines
    async with opened(path) as log:
        found = {b"%d" % record.offset: record.value for record in await stored(log)}
        assert {offset: found[offset].rpartition(b"-")[0] for offset in acknowledged} == acknowledged
        assert (await append(log, b"next")).offset == len(found)


def tear(wal: Path, how: str) -> None:
    size = wal.stat().st_size
    if how == "garbage":
        with wal.open("r+b") as file:
            file.seek(size - 5000)
            file.write(b"\xff" * 5000)
    else:
        os.truncate(wal, {"a little": size - 1, "half a page": size - 4096, "half of it": size // 2}[how])


@pytest.mark.parametrize("torn", ["a little", "half a page", "half of it", "garbage"])
async def test_a_torn_wal_reopens_with_the_earlier_records(path: Path, tmp_path: Path, torn: str) -> None:
    copy = tmp_path / "copy.db"
    async with opened(path) as log:
        for n in range(20):
            await append(log, b"%d" % n + bytes(3000))
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    tear(Path(f"{copy}-wal"), torn)
    async with opened(copy) as log:
        values = [record.value.rstrip(b"\0") for record in await stored(log)]
        assert 5 < len(values) < 20
        assert values == [b"%d" % n for n in range(len(values))]
        assert (await append(log, b"next")).offset == len(values)


# Consumers


async def test_a_consumer_hears_of_an_append_without_polling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "POLL_INTERVAL", 3600.0)
    async with opened(path) as log:
        consumer = await log.consume(group="router", topics=["events"], listener=Silent())
        fetching = asyncio.create_task(consumer.fetch(timeout=30.0))
        await asyncio.sleep(0)
        await append(log, b"a")
        async with asyncio.timeout(5.0):
            ((_, (record,)),) = await fetching
        assert record.value == b"a"
        await consumer.close()


async def test_a_consumer_behind_its_buffer_reads_from_the_file(path: Path) -> None:
    async with opened(path) as log:
        consumer = await log.consume(group="router", topics=["events"], listener=Silent())
        body = bytes(50_000)
        count = 3 * BUFFER_BYTES // len(body)
        for first in range(0, count, 40):
            await asyncio.gather(*[append(log, b"%d " % n + body) for n in range(first, min(first + 40, count))])
        stream = consumer._streams[Partition("events", 0)]
        assert stream.size <= BUFFER_BYTES
        got: list[bytes] = []
        while len(got) < count:
            for _, records in await consumer.fetch(timeout=5.0):
                got += [record.value.split()[0] for record in records]
            assert stream.size <= BUFFER_BYTES
        assert got == [b"%d" % n for n in range(count)]
        await append(log, b"back at the tail")
        assert [len(records) for _, records in await consumer.fetch(timeout=5.0)] == [1]
        await consumer.close()


async def test_a_consumer_of_many_topics_gets_no_more_from_memory_than_of_four(path: Path) -> None:
    async with opened(path) as log:
        topics = [f"events.{number}" for number in range(8)]
        await log.create([TopicSpec(name=topic, partitions=1, retention=None) for topic in topics])
        consumer = await log.consume(group="router", topics=topics, listener=Silent())
        for topic in topics:
            await log.append_in_order(Partition(topic, 0), [NewRecord(b"k", bytes(500_000), [])] * 7)
        assert 12 << 20 < sum([stream.size for stream in consumer._streams.values()]) <= ALL_BUFFER_BYTES
        got = Counter[str]()
        while got.total() < 7 * len(topics):
            for partition, records in await consumer.fetch(timeout=5.0):
                got[partition.topic] += len(records)
        assert got == dict.fromkeys(topics, 7)
        await consumer.close()


async def test_consumers_of_one_topic_take_pieces_of_their_own(path: Path) -> None:
    """Both are handed what was just stored: what one of them cuts off isn't cut off for the other."""
    async with opened(path) as log:
        await append(log, b"a")
        slow, fast = [await log.consume(group=group, topics=["events"], listener=Silent()) for group in ("a", "b")]
        for consumer in (slow, fast):
            assert [len(records) for _, records in await consumer.fetch(timeout=5.0)] == [1]
        await log.append_in_order(Partition("events", 0), [NewRecord(b"k", bytes(600), [])] * 9)
        for consumer in (slow, fast):
            got = list[int]()
            async with asyncio.timeout(5):
                while len(got) < 9:
                    for _, records in await consumer.fetch(timeout=5.0, max_bytes=1000):
                        got += [record.offset for record in records]
            assert got == list(range(1, 10))
            await consumer.close()


async def test_a_consumer_reads_old_records_without_polling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "POLL_INTERVAL", 3600.0)
    async with opened(path) as log:
        await append(log, b"a")
        consumer = await log.consume(group="router", topics=["events"], listener=Silent())
        assert [len(records) for _, records in await consumer.fetch(timeout=5.0)] == [1]
        await consumer.close()


async def test_a_record_that_is_handed_on_while_it_is_read_comes_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poll may see a commit before the writer's callback has run."""
    may_read = threading.Event()
    read = statements.select

    def read_later(*args: Any, **named: Any) -> Any:
        may_read.wait(5.0)
        return read(*args, **named)

    monkeypatch.setattr(statements, "select", read_later)
    async with opened(path) as log:
        consumer = await log.consume(group="router", topics=["events"], listener=Silent())
        consumer.extend({"events": 1})
        assert not await consumer.fetch(timeout=0.0)
        await append(log, b"a")
        may_read.set()
        await log.bounds("events")  # The reader has had its turn.
        got = [*await consumer.fetch(timeout=5.0), *await consumer.fetch(timeout=0.05)]
        assert [[record.value for record in records] for _, records in got] == [[b"a"]]
        await consumer.close()


async def test_a_paused_topic_takes_no_memory(path: Path) -> None:
    async with opened(path) as log:
        consumer = await log.consume(group="router", topics=["events"], listener=Silent())
        consumer.pause(Partition("events", 0))
        await asyncio.gather(*[append(log, bytes(1000)) for _ in range(100)])
        assert consumer._streams[Partition("events", 0)].size == 0
        assert consumer.lag() == {Partition("events", 0): 100}
        consumer.resume(Partition("events", 0))
        assert [len(records) for _, records in await consumer.fetch(timeout=5.0)] == [100]
        await consumer.close()


@pytest.mark.parametrize(
    "headers",
    [b'[["gw_v","1"\x00]', b'[["gw_v", 1]]', b'[["gw_v"]]', b"[7]", b"7", b"\xff", b"", b'[["gw_v", "\xc4\x80"]]'],
)
async def test_a_record_with_damaged_headers_is_read_as_one_that_nobody_can_decode(path: Path, headers: bytes) -> None:
    async with opened(path) as log:
        for value in (b"0", b"1", b"2"):
            await log.append("events", key=b"k", value=value, headers=[("gw_v", b"1")])
        await append(log, b"3", topic="control")
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE records SET headers = ? WHERE value = CAST('1' AS BLOB)", (headers,))
    async with opened(path) as log:
        consumer = await log.consume(group="router", topics=["events", "control"], listener=Silent())
        fetched = {batch.partition.topic: batch.records for batch in await consumer.fetch(timeout=5.0)}
        assert [record.value for record in fetched["control"]] == [b"3"]
        for records in (fetched["events"], await stored(log)):
            assert [record.value for record in records] == [b"0", b"1", b"2"]
            assert [list(record.headers) for record in records] == [
                [("gw_v", b"1")],
                [(DAMAGED_HEADERS, headers)],
                [("gw_v", b"1")],
            ]
            with pytest.raises(UndecodableRecordError):
                decode_event(records[1])
        await consumer.close()


async def test_a_fetch_raises_nothing_while_the_file_cannot_be_read(path: Path) -> None:
    async with opened(path) as log:
        await append(log, b"a")
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ALTER TABLE records RENAME TO elsewhere")
            consumer = await log.consume(group="router", topics=["events"], listener=Silent())
            assert not await consumer.fetch(timeout=0.1)
            assert not await consumer.fetch(timeout=0.1)
            connection.execute("ALTER TABLE elsewhere RENAME TO records")
        assert [len(records) for _, records in await consumer.fetch(timeout=5.0)] == [1]
        await consumer.close()


# Retention and time


async def test_a_sweep_deletes_only_records_older_than_the_retention(path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    kept_for_ever = TopicSpec(name="kept", partitions=1, retention=None)
    await log.create([EVENTS, kept_for_ever])
    old = 2 * sweep.SWEEP_RECORDS + 5
    await asyncio.gather(*[append(log, b"old") for _ in range(old)])
    await append(log, b"kept", topic="kept")
    clock.time += 7 * DAY - 60
    await append(log, b"younger")
    await log.sweep()
    assert await log.bounds("events") == {0: (0, old + 1)}
    clock.time += 120
    consumer = await log.consume(group="router", topics=["events"], listener=Silent())
    await log.sweep()
    assert await log.bounds("events") == {0: (old, old + 1)}
    assert [record.value for record in await stored(log)] == [b"younger"]
    assert [record.value for record in await stored(log, "kept")] == [b"kept"]
    assert [record.value for _, records in await consumer.fetch(timeout=5.0) for record in records] == [b"younger"]
    await consumer.close()
    await log.close()


async def test_a_clock_that_is_set_forward_makes_nothing_old(path: Path) -> None:
    clock, ticks = Clock(), Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=ticks, sweep_interval=None)
    await log.create([EVENTS])

    async def swept(*, after: float) -> list[bytes]:
        clock.time += after
        ticks.time += after
        await log.sweep()
        return [record.value for record in await stored(log)]

    await append(log, b"before")
    clock.time += 9 * DAY
    with structlog.testing.capture_logs() as lines:
        assert await swept(after=0) == [b"before"]
        await append(log, b"after")
        assert await swept(after=6 * DAY) == [b"before", b"after"]
        await append(log, b"later")
        assert await swept(after=1.01 * DAY) == [b"later"]
        assert await swept(after=6 * DAY) == []
    assert lines == [{"event": "clock_set_forward", "log_level": "warning", "path": str(path), "seconds": 9 * DAY}]
    await log.close()


async def test_each_time_that_a_clock_is_set_forward_is_told(path: Path) -> None:
    clock, ticks = Clock(), Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=ticks, sweep_interval=None)
    await log.create([EVENTS])
    with structlog.testing.capture_logs() as lines:
        for days in (9, 0, 2):
            clock.time += days * DAY
            await log.sweep()
    assert [line["seconds"] for line in lines] == [9 * DAY, 2 * DAY]
    await log.close()


@pytest.mark.parametrize("is_swept", [True, False], ids=["seen by a sweep", "seen when it ends"])
async def test_a_clock_that_was_set_forward_makes_nothing_old_after_a_restart_either(
    path: Path, *, is_swept: bool
) -> None:
    clock, ticks = Clock(), Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=ticks, sweep_interval=None)
    await log.create([EVENTS])
    await append(log, b"before")
    clock.time += 9 * DAY
    with structlog.testing.capture_logs() as lines:
        if is_swept:
            await log.sweep()
        await log.close()
        log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=Clock(), sweep_interval=None)
        await log.sweep()
    assert [line["event"] for line in lines] == ["clock_set_forward"], "told once"
    assert [record.value for record in await stored(log)] == [b"before"]
    await log.close()


async def test_an_offset_is_never_used_again_after_all_records_were_deleted(path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    await asyncio.gather(*[append(log, b"old") for _ in range(10)])
    clock.time += 8 * DAY
    await log.sweep()
    assert await log.bounds("events") == {0: (10, 10)}
    assert (await append(log, b"next")).offset == 10
    clock.time += 8 * DAY
    await log.sweep()
    await log.close()
    async with opened(path) as log:
        assert (await append(log, b"next")).offset == 11


async def test_a_sweep_gives_much_free_space_back_to_the_file_system(path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    await asyncio.gather(*[append(log, bytes(20_000)) for _ in range(300)])
    await log.close()
    full = len(contents(path.parent)["gateway.db"])
    assert full > 300 * 20_000
    clock.time += 8 * DAY
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.sweep()
    await log.close()
    assert len(contents(path.parent)["gateway.db"]) < full / 20


async def test_a_file_stops_growing_after_its_retention(path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=None)
    await log.create([EVENTS])
    sizes: list[int] = []
    for _ in range(24):
        await asyncio.gather(*[append(log, bytes(2500)) for _ in range(200)])
        clock.time += DAY
        await log.sweep()
        log._file.writer.execute("PRAGMA wal_checkpoint").fetchall()
        sizes.append(len(contents(path.parent)["gateway.db"]))
    await log.close()
    assert sizes[6] > 6 * 200 * 2500
    assert max(sizes) < 1.2 * sizes[7]


async def test_the_owner_sweeps_by_itself(path: Path) -> None:
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=0.01)
    await log.create([EVENTS])
    await append(log, b"old")
    clock.time += 8 * DAY
    async with asyncio.timeout(5.0):
        while await log.bounds("events") != {0: (1, 1)}:
            pass
    await log.close()


async def test_a_process_that_never_lives_for_an_interval_sweeps_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MIN_SWEEP_DELAY", 0.01)
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=3600.0)
    await log.create([EVENTS])
    await append(log, b"old")
    await log.close()
    for _ in range(3):
        clock.time += 3 * DAY
        log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=3600.0)
        async with asyncio.timeout(5.0):
            while await asyncio.to_thread(last_sweep, path) < clock.time:
                pass
        await log.close()
    async with opened(path, owner=False) as log:
        assert await log.bounds("events") == {0: (1, 1)}


async def test_a_process_that_starts_soon_after_the_last_sweep_waits_for_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MIN_SWEEP_DELAY", 0.01)
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=None)
    await log.sweep()
    await log.close()
    for passed, within in ((0.0, (3500, 3600)), (1800.0, (1700, 1800)), (1801.0, (0, 0.02)), (-7200.0, (3590, 3600))):
        clock.time += passed
        log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock, sweep_interval=3600.0)
        assert log._sweeping is not None
        assert within[0] <= log._sweeping.when() - asyncio.get_running_loop().time() <= within[1]
        await log.close()


def last_sweep(path: Path) -> float:
    with closing(sqlite3.connect(path)) as connection:
        return sweep.swept_at(connection)


async def test_a_sweep_deletes_done_records_that_nobody_rereads(path: Path) -> None:
    tier = TopicSpec(name="tier", partitions=1, retention=7 * DAY, until_done=True)
    async with opened(path) as log:
        await log.create([tier])
        for topic in ("tier", "events"):
            await asyncio.gather(*[append(log, b"%d" % n, topic=topic) for n in range(2500)])
        await log.sweep()
        assert await log.bounds("tier") == {0: (0, 2500)}  # of no group is it known what it has done
        await log.seed("router", {Partition(topic, 0): Commit(2100, b"\x06") for topic in ("tier", "events")})
        await log.seed("other", {Partition("tier", 0): Commit(2000)})
        await log.sweep()
        assert await log.bounds("tier") == {0: (2000, 2500)}
        assert await log.bounds("events") == {0: (0, 2500)}
        await log.write(lambda file: file.execute("DELETE FROM commits WHERE member = ?", ("other",)))
        await log.sweep()
        assert await log.bounds("tier") == {0: (2100, 2500)}
        consumer = await log.consume(group="router", topics=["tier"], listener=Silent())
        assert (await consumer.fetch(timeout=5.0))[0].records[0].value == b"2100"
        await consumer.close()


async def test_an_owner_that_is_not_to_sweep_deletes_nothing(path: Path, tmp_path: Path) -> None:
    clock = Clock()
    logs = [
        await EmbeddedLog.open(each, owner=True, clock=clock, monotonic=clock, sweep_interval=interval)
        for each, interval in ((path, None), (tmp_path / "other.db", 0.01))
    ]
    for log in logs:
        await log.create([EVENTS])
        await append(log, b"old")
    clock.time += 8 * DAY
    async with asyncio.timeout(5.0):
        while await logs[1].bounds("events") != {0: (1, 1)}:
            pass
    assert await logs[0].bounds("events") == {0: (0, 1)}
    for log in logs:
        await log.close()


async def test_appends_come_between_the_steps_of_a_sweep(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SWEEP_RECORDS", 1)
    clock = Clock()
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    await asyncio.gather(*[append(log, b"old") for _ in range(200)])
    clock.time += 8 * DAY
    sweeping = asyncio.create_task(log.sweep())
    await asyncio.sleep(0)
    await append(log, b"new")
    assert not sweeping.done()
    await sweeping
    assert [record.value for record in await stored(log)] == [b"new"]
    await log.close()


async def test_the_clock_advances_when_the_computers_goes_back(path: Path) -> None:
    clock = Clock(5000.0)
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    first = log.now()
    assert first == pytest.approx(5000.0, abs=1.0)
    clock.time -= 3600
    second = log.now()
    position = await append(log, b"a")
    third = log.now()
    assert first < second < position.appended_at + 2e-6
    assert position.appended_at <= third < first + 10
    clock.time += 7200
    assert log.now() == pytest.approx(8600.0, abs=1.0)
    await log.close()


async def test_a_record_of_the_future_is_read_as_one_of_now(path: Path) -> None:
    """The clock was set back while the gateway was down: what waits in a tier must not wait for that hour too."""
    clock = Clock(5000.0)
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    await log.create([EVENTS])
    await append(log, b"a")
    await log.close()
    clock.time -= 3600
    log = await EmbeddedLog.open(path, owner=True, clock=clock, monotonic=clock)
    (record,) = await stored(log)
    assert record.appended_at <= log.now() < 1500.0
    await log.close()


# Compaction and check


async def test_a_file_is_refused_a_topic_too_many_and_keeps_storing(path: Path) -> None:
    async with opened(path) as log:
        with closing(sqlite3.connect(path)) as file, file:
            file.execute("INSERT INTO topics (id, name, compacted) VALUES (?, 'last', 0)", (LAST_TOPIC,))
        with pytest.raises(UsageError, match="one-too-many: expected room for it in the file, got one with 32767"):
            await log.create([TopicSpec(name="one-too-many", partitions=1, retention=None)])
        assert (await append(log, b"1", topic="last")).offset == 0
        assert (await append(log, b"1")).offset == 0
        assert [record.value for record in await stored(log, "last")] == [b"1"]
        assert "one-too-many" not in await log.topics()


async def test_compaction_leaves_one_record_a_key_at_once(path: Path) -> None:
    async with opened(path) as log:
        await asyncio.gather(*[append(log, b"%d" % n, topic="control", key=b"%d" % (n % 3)) for n in range(30)])
        await append(log, b"30", topic="control", key=b"0")
        found = [(record.offset, record.key) for record in await stored(log, "control")]
        assert found == [(28, b"1"), (29, b"2"), (30, b"0")]
        assert await log.bounds("control") == {0: (0, 31)}


@pytest.mark.parametrize(
    ("pragma", "message"), [("synchronous = NORMAL", "synchronous 2"), ("journal_mode = DELETE", "journal_mode wal")]
)
async def test_a_file_that_can_lose_acknowledged_events_is_reported(path: Path, pragma: str, message: str) -> None:
    async with opened(path) as log:
        assert await log.check([EVENTS, CONTROL]) == []
        log._file.reader.close()  # The journal's mode is changed by one that is alone.
        log._file.writer.execute(f"PRAGMA {pragma}")
        problems = await log.check([EVENTS])
        assert [(problem.topic, problem.is_fatal) for problem in problems] == [("events", True)]
        assert message in problems[0].message
