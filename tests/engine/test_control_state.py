from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, decode
from gateway.engine.control.state import KICK_HEARTBEAT_TIMEOUT, Control
from gateway.log.base import Partition
from gateway.model import NewerRecordError, UndecodableRecordError, UnreadableRecordError
from tests.log.test_records import misshapen

SELECTION = Selection(
    route="build", destination="ci", source="github", since=1.5, until=2.5, rate=10.0, starts={"gateway.events.a/0": 3}
)
COMMANDS = {
    "pause": ControlRecord(kind="pause", name="destination/ci", state="paused", at=1.5),
    "kick": ControlRecord(kind="kick", name="route/build", state="requested", at=1.5),
    "dead": ControlRecord(
        kind="dead",
        name="1f-ab",
        state="done",
        at=1.5,
        checkpoint={"gateway.dead/0": 7},
        action="drop",
        filter=DeadFilter(route="build", destination="ci", reason="gone", ids=("dlv_1", "dlv_2"), since=1.0, until=2.0),
        count=2,
    ),
    "replay": ControlRecord(
        kind="replay",
        name="1f-ab",
        state="cancelled",
        at=1.5,
        checkpoint={"gateway.events.a/0": 9},
        selection=SELECTION,
        count=3,
        detail="no route",
    ),
    "checkpoint": ControlRecord(
        kind="checkpoint",
        name="replay/1f-ab",
        state="requested",
        at=1.5,
        checkpoint={"gateway.events.a/0": 9},
        covers_commands_below=17,
        expedited={"gateway.retry.5s/0": 4},
    ),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_control_record_is_read_as_it_was_written(kind: str) -> None:
    assert decode(*COMMANDS[kind].encode()) == COMMANDS[kind]


def test_what_a_kick_has_come_to_is_stored_under_the_names_that_other_versions_read() -> None:
    outcome = ControlRecord(
        kind="checkpoint", name="kick/route/build", state="done", at=1.5, tried=1, untried_by_reason={"paused": 2}
    )
    value = orjson.loads(outcome.encode()[1])
    assert (value["tried"], value["waiting_by_reason"]) == (1, {"paused": 2})
    assert decode(*outcome.encode()) == outcome


@pytest.mark.parametrize("kind", COMMANDS)
def test_any_value_is_a_control_record_or_undecodable(kind: str) -> None:
    """A field of another type, however deep, that is missing, or cut: one kind of error, or what can be obeyed."""
    key, value = COMMANDS[kind].encode()

    @given(misshapen(orjson.loads(value)) | st.binary(max_size=30))
    def check(value: bytes) -> None:
        see_read(key, value)

    check()


@given(st.binary(max_size=30) | st.text(max_size=30).map(str.encode), st.sampled_from(list(COMMANDS)))
def test_any_key_is_one_of_a_control_record_or_undecodable(key: bytes, kind: str) -> None:
    value = COMMANDS[kind].encode()[1]
    for each in (key, kind.encode() + b"/" + key, kind.encode() + b"/route/" + key):
        see_read(each, value)
        see_read(each, b"")


@pytest.mark.parametrize("first", ["command", "checkpoint"])
def test_nothing_is_kept_of_a_command_that_is_deleted(first: str) -> None:
    asked = ControlRecord(kind="replay", name="x", state="requested", at=1.0, selection=Selection(route="r", since=0.0))
    checkpoint = ControlRecord(kind="checkpoint", name=asked.key, state="done", at=2.0)
    control = Control([asked, checkpoint, asked.with_state("done")])
    deleted = [each.with_state("deleted") for each in (asked, checkpoint)]
    one, other = deleted if first == "command" else reversed(deleted)
    control.apply(one, 4)
    assert control.offset_of(asked.key) is not None, "by this a late checkpoint is told from a new one"
    control.apply(other, 5)
    assert control.offset_of(asked.key) is None
    control.apply(asked, 6)
    assert control.offset_of(asked.key) == 6


def see_read(key: bytes, value: bytes) -> None:
    """See that a record is refused, or read as what can be written and is the same again; and that all go on."""
    control = Control(COMMANDS.values())
    with suppress(UnreadableRecordError):
        control.decode_and_apply(key, value)
    control.next_replay()
    control.ended(1e9)
    control.paused_by("build", "ci")
    try:
        command = decode(key, value)
    except UnreadableRecordError:
        return
    assert decode(*command.encode()) == command


def body(kind: str, **changes: object) -> tuple[bytes, bytes]:
    key, value = COMMANDS[kind].encode()
    return key, orjson.dumps({**orjson.loads(value), **changes})


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pause", {"state": "requested"}),
        ("pause", {"state": ["paused"]}),
        ("pause", {"checkpoint": {"gateway.parked/0": "3"}}),
        ("pause", {"checkpoint": {"gateway.parked": 3}}),
        ("pause", {"at": "now"}),
        ("pause", {"v": 0}),
        ("pause", {"v": "2"}),
        ("dead", {"filter": {"route": ["build"]}}),
        ("dead", {"filter": {"ids": "dlv_1"}}),
        ("dead", {"filter": {"narrower": "by what we don't know"}}),
        ("dead", {"action": "burn"}),
        ("replay", {"selection": None}),
        ("replay", {"selection": {"route": "build", "since": 0, "rate": 0}}),
        ("replay", {"selection": {"route": "build", "since": 0, "starts": {"a/b": 1}}}),
        ("replay", {"checkpoint": {"gateway.events.a/first": 1}}),
        ("replay", {"checkpoint": {"./0": 1}}),
        ("replay", {"checkpoint": {"../0": 1}}),
        ("replay", {"checkpoint": {"gateway.events.a/00": 1}}),
        ("replay", {"selection": {"route": "build", "since": 0, "starts": {"./0": 1}}}),
    ],
)
def test_a_control_record_with_a_field_of_another_kind_is_undecodable(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UndecodableRecordError, match=r"control record '\w+/.*: expected .*, got"):
        decode(*body(kind, **changes))


def test_unreadable_records_change_nothing_in_force() -> None:
    control = Control([COMMANDS["pause"]])
    with pytest.raises(UndecodableRecordError):
        control.decode_and_apply(b"pause/destination/ci", b'{"state": "active"')
    assert control.paused_by("", "ci") == "destination/ci"


def test_a_newer_versions_command_is_not_executed_and_its_pause_holds() -> None:
    control = Control([COMMANDS["dead"], COMMANDS["kick"]])
    for kind, key in (("pause", b"pause/destination/audit"), ("kick", b"kick/route/build"), ("dead", b"dead/1f-ab")):
        with pytest.raises(NewerRecordError):
            control.decode_and_apply(key, body(kind, v=2, state={"anything": "else"})[1])
    assert control.paused_by("", "audit") == "destination/audit"
    assert set(control.commands) == {"pause/destination/audit"}
    assert control.is_left_to_newer_version("kick/route/build")


def test_a_kick_reserves_its_announced_retries_until_answered() -> None:
    """By whomever: an owner of before may have answered it already, and brings nothing on."""
    place = Partition("gateway.retry.20s", 0)
    kick = ControlRecord(kind="kick", name="destination/ci", state="requested", at=1.5)
    announced = ControlRecord(
        kind="checkpoint",
        name="announcement/kick/destination/ci",
        state="done",
        at=2.0,
        checkpoint={f"{place.topic}/0": 7},
    )
    answer = ControlRecord(kind="checkpoint", name="kick/destination/ci", state="done", at=3.0, covers_commands_below=6)
    for answers in ((), (answer,)):
        control = Control()
        for offset, command in ((5, kick), *[(6, command) for command in answers], (7, announced)):
            control.decode_and_apply(*command.encode(), offset)
        assert control.is_kick_pending("build", "ci", place, 6) is not bool(answers)
        assert not control.is_kick_pending("build", "ci", place, 7)


@pytest.mark.parametrize(("kind", "name"), [("pause", "route/build"), ("kick", "destination/ci")])
def test_an_early_checkpoint_that_is_appended_after_the_last_one_leaves_its_command_ended(
    kind: Literal["pause", "kick"], name: str
) -> None:
    """It is the try of an append that had no answer. What has overwritten the last one has to be overwritten again."""
    command = ControlRecord(kind=kind, name=name, state="resuming" if kind == "pause" else "requested", at=1.5)
    early = ControlRecord(
        kind="checkpoint", name=command.key, state="requested", at=2.0, checkpoint={"gateway.parked/0": 3}
    )
    last = replace(early, state="done", at=3.0, checkpoint={"gateway.parked/0": 9}, covers_commands_below=6)
    control = Control()
    for offset, record in enumerate((command, early, last), 5):
        control.decode_and_apply(*record.encode(), offset)
    assert not control.overwritten_checkpoints()
    control.decode_and_apply(*early.encode(), 8)
    assert not control.has_pending(command.key)
    assert control.checkpoint(command.key) == last.checkpoint
    assert list(control.overwritten_checkpoints()) == [last]
    control.decode_and_apply(*last.encode(), 9)
    assert not control.overwritten_checkpoints()
    # The next command's own is no late one; the former command's is, still.
    own = replace(early, at=5.0, checkpoint={"gateway.parked/0": 12}, covers_commands_below=6)
    for offset, record in enumerate((replace(command, at=4.0), own), 10):
        control.decode_and_apply(*record.encode(), offset)
    assert not control.overwritten_checkpoints()
    control.decode_and_apply(*early.encode(), 12)
    assert control.has_pending(command.key)
    assert control.checkpoint(command.key) == own.checkpoint
    assert list(control.overwritten_checkpoints()) == [own]
    control.forget_offsets()
    assert not control.overwritten_checkpoints(), "it would cover commands of the recreated topic"


def test_a_checkpoint_that_repeats_what_the_last_one_has_ended_leaves_its_command_ended() -> None:
    """Its append failed at first; when it is tried again, it says which commands are covered by then."""
    kick = ControlRecord(kind="kick", name="destination/ci", state="requested", at=1.0)
    last = ControlRecord(kind="checkpoint", name=kick.key, state="done", at=2.0, count=3, covers_commands_below=6)
    repeated = replace(last, state="requested", at=3.0)
    control = Control()
    for offset, record in enumerate((kick, last, repeated), 5):
        control.decode_and_apply(*record.encode(), offset)
    assert not control.has_pending(kick.key)
    assert list(control.overwritten_checkpoints()) == [last], "who starts later would take the kick for pending"
    control.decode_and_apply(*last.encode(), 8)
    assert not control.overwritten_checkpoints()
    for offset, record in enumerate((kick, repeated), 9):
        control.decode_and_apply(*record.encode(), offset)
    assert control.is_begun(kick.key), "one of the next command comes after the last one of this"


def test_a_replays_early_checkpoint_that_is_appended_late_takes_nothing_back() -> None:
    command = replace(COMMANDS["replay"], state="requested")
    early = ControlRecord(kind="checkpoint", name=command.key, state="done", at=2.0, checkpoint={"a/0": 3}, count=1)
    last = replace(early, checkpoint={"a/0": 3, "b/0": 4}, count=2, known_below=(7, 8))
    control = Control()
    for offset, record in enumerate((command, early, last, early)):
        control.decode_and_apply(*record.encode(), offset)
    assert control.checkpoint(command.key) == last.checkpoint
    assert control.known_below(command.key) == (7, 8)
    assert list(control.overwritten_checkpoints()) == [last]
    further = replace(last, checkpoint={"a/0": 5, "b/0": 4})
    control.decode_and_apply(*further.encode(), 4)
    assert control.checkpoint(command.key) == further.checkpoint
    assert not control.overwritten_checkpoints()


def test_a_kick_reserves_its_announced_retries_while_its_heartbeats_come() -> None:
    place = Partition("gateway.retry.20s", 0)
    kick = ControlRecord(kind="kick", name="destination/ci", state="requested", at=1.5)
    announced = ControlRecord(
        kind="checkpoint",
        name="announcement/kick/destination/ci",
        state="done",
        at=2.0,
        checkpoint={f"{place.topic}/0": 7},
        covers_commands_below=6,
    )
    checkpoint = ControlRecord(kind="checkpoint", name="kick/destination/ci", state="requested", at=3.0)
    control = Control()
    control.read_at = 100.0
    for offset, record in ((5, kick), (6, announced)):
        control.decode_and_apply(*record.encode(), offset)
    control.read_at = 99.0 + KICK_HEARTBEAT_TIMEOUT
    assert control.is_kick_pending("build", "ci", place, 6)
    control.decode_and_apply(*checkpoint.encode(), 7)
    control.read_at += KICK_HEARTBEAT_TIMEOUT - 1.0
    assert control.is_kick_pending("build", "ci", place, 6)
    control.read_at += 1.0
    assert not control.is_kick_pending("build", "ci", place, 6)
    control.decode_and_apply(*announced.encode(), 8)
    assert control.is_kick_pending("build", "ci", place, 6)
    withdrawn = replace(announced, checkpoint={})
    assert control.kicks == 1
    control.decode_and_apply(*withdrawn.encode(), 9)
    assert not control.is_kick_pending("build", "ci", place, 6)
    assert control.kicks == 1, "it isn't taken for another kick"


def test_a_kind_of_control_record_that_only_a_newer_version_knows_is_not_garbage() -> None:
    control = Control()
    with pytest.raises(NewerRecordError):
        control.decode_and_apply(b"throttle/destination/ci", b'{"v": 2}')
    assert control.newer.keys() == {"throttle/destination/ci"}
    control.decode_and_apply(b"throttle/destination/ci", b"")
    assert not control.newer
    with pytest.raises(UndecodableRecordError):
        control.decode_and_apply(b"throttle/destination/ci", b'{"v": 1}')


def test_a_replay_whose_checkpoint_a_newer_version_wrote_is_left_to_it() -> None:
    asked = ControlRecord(kind="replay", name="1f-ab", state="requested", at=1.5, selection=SELECTION)
    control = Control([asked, COMMANDS["checkpoint"]])
    assert control.next_replay() == asked
    with pytest.raises(NewerRecordError):
        control.decode_and_apply(b"checkpoint/replay/1f-ab", b'{"v": 2}')
    assert control.next_replay() is None
    assert control.checkpoint("replay/1f-ab") == COMMANDS["checkpoint"].checkpoint
    control.decode_and_apply(*COMMANDS["checkpoint"].encode())
    assert control.next_replay() == asked
