"""The spool in a world of faults: each event that was acknowledged is in the log, once, in the order of its key."""

from collections.abc import Sequence
from itertools import combinations
from random import Random

import pytest

from gateway.spool import mover
from tests.run_seeds import drawn
from tests.spool.world import World
from tests.virtual_time import run

SEEDS = 40
KEPT = {
    3: "appends without an answer, of which some are stored",
    7: "what a sender's append left under way is stored while it is moved",
    8: "a kill after some of what it moves was stored",
    20: "more partitions: what was tried is in the one that its key had before",
}
"""Seeds that a mutant fails."""
KEPT_WITH_MORE = {
    54000009: (20, "a kill after a drop, while what is beyond it is in doubt"),
    2720937223029: (4_000, "a drop that is killed, and the process as well: nothing waits, and some is there"),
    1900000000815: (20, "what a killed process's client had yet to send, as its partition had no leader"),
    1854252120015: (20, "what can't be read in the spool comes late, by its sender's append"),
}
"""Seeds with faults that aren't Kafka's, and how many records a turn has: what a mutant or the ledger got wrong."""


async def _one(seed: int, *, more: bool = False) -> World:
    world = World(seed, more=more)
    await world.run()
    return world


def judge(seed: int, turn_records: int = mover.TURN_RECORDS, *, more: bool = False) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mover, "TURN_RECORDS", turn_records)
        world = run(_one(seed, more=more))
    assert world.verdict() == [], f"seed {seed}"


@pytest.mark.parametrize("seed", KEPT)
def test_what_a_mutant_fails(seed: int) -> None:
    judge(seed)


@pytest.mark.parametrize("seed", KEPT_WITH_MORE)
def test_what_a_mutant_fails_of_the_spools_own_faults(seed: int) -> None:
    turn_records, _ = KEPT_WITH_MORE[seed]
    judge(seed, turn_records, more=True)


@pytest.mark.timeout(900)  # 500 of them, with --full
@pytest.mark.parametrize("number", range(4))
def test_new_seeds(number: int, *, is_full: bool) -> None:
    count = 500 if is_full else SEEDS // 4
    for seed in range(drawn() + number * count, drawn() + (number + 1) * count):
        # What a turn doesn't get to has to be right in the next ones.
        judge(seed, Random(f"{seed}/turn").choice((5, 20, 100, mover.TURN_RECORDS)), more=True)


def test_the_same_seed_is_the_same_run() -> None:
    assert run(_one(7, more=True)).trace == run(_one(7, more=True)).trace


def test_an_acknowledged_event_that_is_lost_repeated_or_out_of_order_is_noticed() -> None:
    world = run(_one(3))
    assert world.verdict() == []
    topic = world.sent[0].topic
    segments = [world.log._state.segments[each].records for each in world.log._state.of(topic)]
    records = max(segments, key=len)
    first = records.pop(0)
    assert any(each.startswith("lost") for each in world.verdict())
    records[:0] = [first, first]
    assert any(each.startswith("2 times") for each in world.verdict())
    records.pop(0)
    assert world.verdict() == []
    before, after = _in_order(world, [each.value for each in records])
    records[before], records[after] = (
        records[before]._replace(value=records[after].value),
        records[after]._replace(value=records[before].value),
    )
    assert any(each.startswith("order") for each in world.verdict())


def _in_order(world: World, values: Sequence[bytes]) -> tuple[int, int]:
    """Return where two events of one key are, of which one was acknowledged before the other was sent."""
    places = {value: index for index, value in enumerate(values)}
    sent = [each for each in sorted(world.sent, key=lambda each: each.began) if each.id in places]
    return next(
        (places[before.id], places[after.id])
        for before, after in combinations(sent, 2)
        if before.key == after.key and before.acknowledged_at is not None and before.acknowledged_at < after.began
    )
