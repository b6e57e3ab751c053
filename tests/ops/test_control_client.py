"""Operators' commands, and how their outcomes are reported."""

from gateway.engine.control.records import ControlRecord, DeadFilter, decode, tried_name
from gateway.log.base import Commit, Partition
from gateway.log.topics import JOBS_GROUP, Topics
from gateway.ops.control_client import ControlClient
from tests.memory_log import MemoryLog

TOPICS = Topics()
DEAD = DeadFilter(route="build")


async def a_log() -> MemoryLog:
    log = MemoryLog()
    await log.create(TOPICS.specs([]))
    return log


async def stored(log: MemoryLog) -> list[ControlRecord]:
    _, end = (await log.bounds(TOPICS.control))[0]
    scan = log.scan(Partition(TOPICS.control, 0), 0, end)
    return [decode(record.key, record.value) async for records in scan for record in records]


async def publish(log: MemoryLog, command: ControlRecord) -> None:
    key, value = command.encode()
    await log.append(TOPICS.control, key=key, value=value, headers=[])


class Sleeper:
    """Counts the waits, and does something in one of them."""

    def __init__(self, log: MemoryLog, *endings: ControlRecord) -> None:
        self.slept: list[float] = []
        self._log = log
        self._endings = list(endings)

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) >= 3 and self._endings:
            await publish(self._log, self._endings.pop(0))


async def test_only_a_paused_name_is_resumed() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    assert await client.resume("route/build") is None
    await publish(log, ControlRecord(kind="pause", name="route/build", state="active", at=1.0))
    assert await client.resume("route/build") is None
    assert len(await stored(log)) == 1


async def test_a_repeated_pause_keeps_the_first_and_one_after_a_resume_counts() -> None:
    log = MemoryLog(now=lambda: at)
    await log.create(TOPICS.specs([]))
    client = ControlClient(log, TOPICS)
    at = 100.0
    first = ControlRecord(kind="pause", name="route/build", state="paused", at=50.0, by="ada@bastion")
    await publish(log, first)
    assert await client.pause("route/build") == (first, False, 0)
    assert await stored(log) == [first]
    await client.resume("route/build")
    at = 200.0
    again, is_new, _ = await client.pause("route/build")
    assert (again.at, is_new) == (200.0, True)
    assert (await client.control()).commands["pause/route/build"] == again


async def test_a_pause_is_confirmed_by_its_offset_and_reported_as_it_applies() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS, sleep=Sleeper(log))
    await log.append(TOPICS.control, key=b"other", value=b"{}", headers=[])
    pause = await client.pause("route/build")
    assert pause.offset == 1
    assert await client.confirmed(pause, timeout=0.0) is None
    await client.resume("route/build")  # by somebody else, and not read yet
    await log.seed(TOPICS.group(JOBS_GROUP), {TOPICS.control_partition: Commit(2)})
    applies = await client.confirmed(pause, timeout=0.0)
    assert applies is not None
    assert applies.state == "resuming"


async def test_a_pause_that_a_newer_version_wrote_is_not_taken_for_one_of_ours() -> None:
    log = await a_log()
    await log.append(TOPICS.control, key=b"pause/route/build", value=b'{"v": 9}', headers=[])
    assert (await ControlClient(log, TOPICS).pause("route/build")).is_new


async def test_the_results_of_ordered_kicks_are_kept_apart() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    name, place = "destination/ci", tried_name("build", "ci", 0)
    await publish(log, ControlRecord(kind="checkpoint", name=place, state="done", at=1.0, tried=9))  # of an earlier one
    kicks = []
    for at, tried in ((2.0, 5), (3.0, 0)):
        kicks.append(await client.kick(name))
        await publish(log, ControlRecord(kind="checkpoint", name=f"announcement/kick/{name}", state="done", at=at))
        await publish(log, ControlRecord(kind="checkpoint", name=place, state="done", at=at, tried=tried))
        assert (await client.ordered_outcomes(kicks[-1]))[place].tried == tried
        # This log compacts at once: the first outcome is replaced, and no other is taken for it.
        assert all([not await client.ordered_outcomes(kick) for kick in kicks[:-1]])
        answer = ControlRecord(
            kind="checkpoint", name=f"kick/{name}", state="done", at=at, covers_commands_below=kicks[-1].offset + 1
        )
        await publish(log, answer)


async def test_an_answer_is_not_that_of_a_second_command_given_before_the_first_was_announced() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    name, place = "destination/ci", tried_name("build", "ci", 0)

    async def carry_out(covers_below: int, *, at: float, count: int) -> None:
        marks = (
            ControlRecord(kind="checkpoint", name=f"announcement/kick/{name}", state="done", at=at),
            ControlRecord(kind="checkpoint", name=place, state="done", at=at, tried=count),
            ControlRecord(
                kind="checkpoint",
                name=f"kick/{name}",
                state="done",
                at=at,
                covers_commands_below=covers_below,
                count=count,
            ),
        )
        for mark in marks:
            await publish(log, mark)

    first, second = await client.kick(name), await client.kick(name)
    assert second.offset == first.offset + 1
    await carry_out(second.offset, at=1.0, count=7)
    answer = await client.finished(first, timeout=0)
    assert answer is not None
    assert answer.count == 7
    assert (await client.ordered_outcomes(first))[place].tried == 7
    assert await client.finished(second, timeout=0) is None
    await publish(log, ControlRecord(kind="checkpoint", name=f"announcement/kick/{name}", state="done", at=2.0))
    await publish(log, ControlRecord(kind="checkpoint", name=place, state="done", at=2.0, tried=3))
    assert (await client.ordered_outcomes(second))[place].tried == 3
    await carry_out(second.offset + 1, at=2.0, count=3)
    answer = await client.finished(second, timeout=0)
    assert answer is not None
    assert answer.count == 3


async def test_a_replay_covers_the_dead_letters_at_its_start() -> None:
    log = await a_log()
    for number in range(8):
        await log.append(TOPICS.dead, key=b"%d" % number, value=b"", headers=[])
    command = (await ControlClient(log, TOPICS).resolve("replay", DEAD)).command
    ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in (await log.bounds(TOPICS.dead)).items()}
    assert command.checkpoint == ends
    assert sum(command.checkpoint.values()) == 8
    assert (command.action, command.filter, command.state) == ("replay", DEAD, "requested")


async def test_two_commands_for_dead_letters_are_kept() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    await client.resolve("replay", DEAD)
    await client.resolve("drop", DEAD)
    assert [command.action for command in (await client.control()).commands.values()] == ["replay", "drop"]


async def test_the_end_of_a_command_is_awaited() -> None:
    log = await a_log()
    placed = await ControlClient(log, TOPICS).resolve("drop", DEAD)
    sleeper = Sleeper(log, placed.command.with_state("done", count=5))
    done = await ControlClient(log, TOPICS, sleep=sleeper).finished(placed, timeout=30)
    assert done is not None
    assert done.count == 5
    assert len(sleeper.slept) == 3


async def test_nobody_to_carry_it_out_is_found_out_in_time() -> None:
    log = await a_log()
    placed = await ControlClient(log, TOPICS).kick("route/build")
    sleeper = Sleeper(log)
    assert await ControlClient(log, TOPICS, sleep=sleeper).finished(placed, timeout=2) is None
    assert 2 <= sum(sleeper.slept) < 2.3


async def test_the_end_of_another_command_is_not_taken_for_ours() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    earlier = (await client.kick("route/build")).command
    placed = await client.kick("route/build")
    other = (await client.kick("route/other")).command
    sleeper = Sleeper(
        log, earlier.with_state("done"), other.with_state("done"), placed.command.with_state("done", count=1)
    )
    done = await ControlClient(log, TOPICS, sleep=sleeper).finished(placed, timeout=30)
    assert done is not None
    assert done.count == 1


async def test_a_record_that_cannot_be_read_is_passed_over() -> None:
    log = await a_log()
    await log.append(TOPICS.control, key=b"pause/route/build", value=b"{", headers=[])
    client = ControlClient(log, TOPICS)
    placed = await client.kick("route/other")
    assert list((await client.control()).commands) == ["kick/route/other"]
    await log.append(TOPICS.control, key=placed.command.key.encode(), value=b"?", headers=[])
    assert await client.finished(placed, timeout=0) is None
