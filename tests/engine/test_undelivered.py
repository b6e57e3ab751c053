"""What the log knows of what a route has delivered: by which rules events were routed, and what a replay makes of it.

Each test ends with a ledger: how often each event reached the route's destination.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
from typing_extensions import override

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, decode
from gateway.engine.control.routing_history import UNUSED_RETENTION
from gateway.engine.control.state import Control
from gateway.engine.jobs.let_through import read_let_through
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY, RECORDS_PER_STEP
from gateway.engine.jobs.replay_matcher import Matcher
from gateway.engine.jobs.runner import FORGET_RULES_INTERVAL
from gateway.engine.jobs.undelivered import (
    Fate,
    OpenDeadLetters,
    Undelivered,
    open_dead_letters,
    resolution,
)
from gateway.engine.worker import Worker
from gateway.log.base import LEADER_CLOCK_SKEW, Partition, Record
from gateway.log.topics import ROUTER_GROUP
from gateway.model import delivery_id, event_id
from gateway.rules.expressions import Expression
from gateway.rules.request_templates import RequestTemplate
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rules import Route, Rules
from gateway.rules.templates import Template
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_jobs import a_backlog, a_command
from tests.engine.test_redeliver import asked as redelivery
from tests.engine.test_replay import TIER, MortalLog, Owner, a_replay, ended, events_of, owning
from tests.engine.test_undecodable_records import of_version
from tests.engine.test_worker import EVENTS, TOPICS, Answer, World, a_world, publish, rules_of, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

OTHER = a_route("other", to=("audit",))


class Scene:
    """A process with its worker and its jobs, whose rules change."""

    def __init__(self, world: World, owner: Owner) -> None:
        self.world = world
        self.owner = owner
        self.put = [an_event()][:0]

    async def events(self, count: int, *, source: str = "github", **body: int) -> None:
        made = [
            an_event(id=f"evt_{len(self.put) + number}", source=source, body={"n": number, **body}, received_at=now())
            for number in range(count)
        ]
        self.put += made
        await self.world.put(*made)
        await asyncio.sleep(3)

    def reload(self, worker: Worker, *routes: Route) -> None:
        self.world.rules = rules_of(*routes)
        worker.reload()

    async def counts(self, destination: str | None = None) -> Counter[Fate]:
        """Count as a dry run does: the deliveries that match, by what is known of each."""
        selection = Selection(route="build", since=0.0, destination=destination)
        log = self.world.log
        dead = await open_dead_letters(log, TOPICS, self.owner.control, selection, readable=log.readable)
        bounds = await self.world.log.bounds(EVENTS)
        ends = {f"{EVENTS}/{number}": end for number, (_, end) in bounds.items()}
        selection = replace(selection, starts=dict.fromkeys(ends, 0))
        let_through = await read_let_through(log, TOPICS, selection, ends, readable=log.readable)
        known = Undelivered(self.owner.control, "build", dead, let_through=let_through, rules=lambda: self.world.rules)
        matcher = Matcher(selection, known)
        assert matcher.use(self.world.rules) is None
        counts: Counter[Fate] = Counter()
        for number, (start, end) in (await self.world.log.bounds(EVENTS)).items():
            partition = Partition(EVENTS, number)
            async for records in self.world.log.scan(partition, start, end):
                for record in records:
                    matched = matcher.match(partition, record)
                    counts.update(matched.fates if matched else ())
        return counts

    async def replay(self, name: str = "x", destination: str | None = None) -> ControlRecord:
        """Replay what is undelivered, and hold the number that is told against the dry run's."""
        expected = (await self.counts(destination))[Fate.UNDELIVERED]
        await a_replay(self.world, name, undelivered=True, destination=destination)
        done = await ended(self.owner.control, name)
        assert done.count == expected
        await asyncio.sleep(10)
        return done

    def resolved_by(self, replay: str) -> list[int]:
        """Return how many deliveries with dead letters a replay has resolved at a time."""
        commands = self.owner.control.commands
        return [command.count for key, command in commands.items() if key.startswith(f"dead/{replay}-")]

    def delivered(self, destination: str = "ci") -> list[int]:
        """Return how often each event reached a destination."""
        made = Counter(event for name, event, _ in self.world.client.made if name == destination)
        return [made[event.id] for event in self.put]


@asynccontextmanager
async def a_scene(*routes: Route, **scripts: Sequence[Answer]) -> AsyncIterator[Scene]:
    world = await a_world(*routes)
    world.client.scripts.update({name: list(answers) for name, answers in scripts.items()})
    owner = Owner(world)
    await owner.start()
    yield Scene(world, owner)
    await owner.stop()


@virtual
async def test_a_new_route_gets_older_events_and_none_twice() -> None:
    async with a_scene(OTHER) as scene, running(scene.world, scene.world.worker(scene.owner.control)) as worker:
        await scene.events(10)
        scene.reload(worker, OTHER, a_route())
        await scene.events(10)
        assert await scene.counts() == {Fate.UNDELIVERED: 10, Fate.ENDED: 10}
        assert (await scene.replay()).count == 10
        assert scene.delivered() == [1] * 20
        assert await scene.counts() == {Fate.ENDED: 20}
        assert (await scene.replay("again")).count == 0
        assert scene.delivered() == [1] * 20


@virtual
async def test_only_the_events_a_changed_condition_missed_are_undelivered() -> None:
    async with a_scene(a_route(when="body.n > 6")) as scene:
        async with running(scene.world, scene.world.worker(scene.owner.control)) as worker:
            await scene.events(10)
            scene.reload(worker, a_route(when="body.n > 3"))
            await scene.events(10)
            assert await scene.counts() == {Fate.UNDELIVERED: 3, Fate.ENDED: 9}
            await scene.replay()
        assert scene.delivered() == 2 * ([0] * 4 + [1] * 6)


@virtual
async def test_records_read_before_a_reload_amid_a_revocation_have_the_former_rules() -> None:
    async with (
        a_scene(OTHER, audit=[1.5]) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await asyncio.sleep(1)
        putting = asyncio.create_task(scene.events(8))
        await asyncio.sleep(0.5)
        rebalancing = asyncio.create_task(scene.world.log.rebalance(TOPICS.group(ROUTER_GROUP)))
        await asyncio.sleep(0.3)
        scene.reload(worker, OTHER, a_route())  # attempts still have a second to end
        await putting
        await rebalancing
        await asyncio.sleep(5)
        assert await scene.counts() == {Fate.UNDELIVERED: 8}
        await scene.replay()
        assert scene.delivered() == [1] * 8


@virtual
async def test_how_events_were_routed_is_not_forgotten_while_they_cannot_be_read() -> None:
    async with a_scene(OTHER) as scene, running(scene.world, scene.world.worker(scene.owner.control)) as worker:
        await scene.events(10)
        scene.reload(worker, OTHER, a_route())
        await scene.events(10)
        partitions = [Partition(EVENTS, number) for number in await scene.world.log.bounds(EVENTS)]
        for partition in partitions:
            scene.world.log.lose_leader(partition)
        await scene.world.doze(2 * FORGET_RULES_INTERVAL)
        for partition in partitions:
            scene.world.log.find_leader(partition)
        assert await scene.counts() == {Fate.UNDELIVERED: 10, Fate.ENDED: 10}


@virtual
async def test_a_routes_new_destination_gets_missed_events() -> None:
    async with a_scene(a_route()) as scene:
        async with running(scene.world, scene.world.worker(scene.owner.control)) as worker:
            await scene.events(5)
            scene.reload(worker, a_route(to=("ci", "audit")))
            await scene.events(5)
            await scene.replay()
        assert scene.delivered() == scene.delivered("audit") == [1] * 10


@virtual
async def test_rules_that_change_with_a_restart_are_published() -> None:
    async with a_scene(OTHER) as scene:
        control = scene.owner.control
        for routes in ((OTHER,), (OTHER, a_route()), (OTHER, a_route()), (OTHER,), (a_route(), OTHER)):
            scene.world.rules = rules_of(*routes)
            async with running(scene.world, scene.world.worker(control)):
                await scene.events(4)
        assert await scene.counts() == {Fate.UNDELIVERED: 8, Fate.ENDED: 12}
        async with running(scene.world, scene.world.worker(control)):
            await scene.replay()
        assert scene.delivered() == [1] * 20
        told = [decode(record.key, record.value).kind for record in scene.world.log.records(TOPICS.control)]
        assert Counter(told)["rules"] == 2, "a revision is published once"
        assert Counter(told)["routed"] == 4, "and a reading where it isn't the one before"


@virtual
async def test_rules_that_come_back_once_they_were_forgotten_are_published_again() -> None:
    """Else all that is routed by them counts as unknown, and a replay of what is undelivered leaves it out."""
    async with a_scene(OTHER) as scene, running(scene.world, scene.world.worker(scene.owner.control)) as worker:
        history, log = scene.owner.control.history, scene.world.log
        revision = routing_revision(rules_of(OTHER, a_route())).name
        await scene.events(3)
        scene.reload(worker, OTHER, a_route())
        await scene.events(3)
        assert history.knows(revision)
        scene.reload(worker, OTHER)
        await scene.events(3)
        for number, (_, end) in (await log.bounds(EVENTS)).items():
            log.delete_below(Partition(EVENTS, number), end)  # a week passes
        await scene.world.doze(UNUSED_RETENTION + 2 * FORGET_RULES_INTERVAL)
        assert not history.knows(revision)
        scene.reload(worker, OTHER, a_route())
        await scene.events(4)
        assert history.knows(revision)
        assert await scene.counts() == {Fate.ENDED: 4}
        await publish(scene.world, ControlRecord(kind="rules", name=revision, state="deleted", at=0.0))
        await asyncio.sleep(5)
        assert history.knows(revision), "the owner of the jobs may delete it just as it comes back"
        assert await scene.counts() == {Fate.ENDED: 4}
        published = log.records(TOPICS.control)
        await asyncio.sleep(60)
        assert log.records(TOPICS.control) == published, "once"


@virtual
async def test_open_dead_letters_are_undelivered_and_resolved_by_the_replay() -> None:
    script = [500, *[200] * 3, 500, *[200] * 30]
    async with a_scene(a_route(retry=a_policy(max_attempts=1)), ci=script) as scene:
        async with running(scene.world, scene.world.worker(scene.owner.control)):
            await scene.events(6)
            one, other = scene.world.dead()
            await publish(
                scene.world,
                ControlRecord(
                    kind="dead",
                    name="d",
                    state="requested",
                    at=now(),
                    action="drop",
                    checkpoint={f"{TOPICS.dead}/{number}": 100 for number in range(4)},
                    filter=DeadFilter(ids=(one.delivery.id,)),
                ),
            )
            await asyncio.sleep(5)
            assert await scene.counts() == {Fate.UNDELIVERED: 1, Fate.ENDED: 5}
            await scene.replay()
        counts = dict(zip([event.id for event in scene.put], scene.delivered(), strict=True))
        assert counts.pop(other.delivery.event.id) == 2, "once in vain"
        assert set(counts.values()) == {1}
        assert await scene.counts() == {Fate.ENDED: 6}
        assert scene.resolved_by("x") == [1]


@virtual
async def test_dead_letters_stored_while_a_replay_was_queued_are_resolved_by_it() -> None:
    script = [*[500] * 6, 200]
    async with (
        a_scene(a_route(retry=a_policy(max_attempts=1)), ci=script) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)),
    ):
        asked_at = now()
        await asyncio.sleep(1)
        await scene.events(6)
        assert len(scene.world.dead()) == 6
        bounds = await scene.world.log.bounds(EVENTS)
        ends = {f"{EVENTS}/{number}": end for number, (_, end) in bounds.items()}
        selection = Selection(route="build", since=0.0, starts=dict.fromkeys(ends, 0), undelivered=True)
        replay = ControlRecord(
            kind="replay", name="x", state="requested", at=asked_at, checkpoint=ends, selection=selection
        )
        await publish(scene.world, replay)
        assert (await ended(scene.owner.control)).count == 6
        await asyncio.sleep(10)
        assert await scene.counts() == {Fate.ENDED: 6}
        assert scene.world.metrics.dead_letter_backlog.value == 0


@virtual
async def test_a_conditions_dead_letters_that_match_after_its_fix_are_undelivered() -> None:
    failing, fixed = a_route(when="body.n + 'x' == 'x'"), a_route(when="body.n < 4")
    async with a_scene(failing) as scene, running(scene.world, scene.world.worker(scene.owner.control)) as worker:
        await scene.events(6)
        assert [stored.metadata.dead_reason for stored in scene.world.dead()] == ["expression_error"] * 6
        scene.reload(worker, fixed)
        assert (await scene.replay()).count == 4
        assert scene.delivered() == [1, 1, 1, 1, 0, 0]
        assert scene.resolved_by("x") == [4]


@virtual
async def test_a_dead_letter_is_replayed_by_the_current_request_whatever_the_condition() -> None:
    template = RequestTemplate(headers=(("X-N", Template("${{ body.m }}")),), body=None)
    other = replace(template, headers=(("X-N", Template("${{ body.n }}")),))
    async with (
        a_scene(a_route(request=template)) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await scene.events(2)
        assert [stored.metadata.dead_reason for stored in scene.world.dead()] == ["expression_error"] * 2
        scene.reload(worker, a_route(request=other, when="body.n > 0"))
        checkpoint = {f"{TOPICS.dead}/{number}": 100 for number in range(4)}
        which = DeadFilter(reason="expression_error")
        command = ControlRecord(
            kind="dead", name="d", state="requested", at=now(), action="replay", checkpoint=checkpoint, filter=which
        )
        await publish(scene.world, command)
        await asyncio.sleep(10)
        assert scene.delivered() == [1, 1], "also what the route would no longer take"


@virtual
async def test_a_killed_processs_records_are_judged_by_their_next_router() -> None:
    """It had read on by the new rules, and nothing of that is committed: the next process reads it by the old ones."""
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await scene.events(4)
        world.rules = rules_of(OTHER, a_route())
        world.log.fail_commits()
        doomed = asyncio.create_task(world.worker(control).run())
        await asyncio.sleep(1)
        await scene.events(4)
        doomed.cancel()
        await asyncio.gather(doomed, return_exceptions=True)
        del world.log._state.members[TOPICS.group(ROUTER_GROUP)]  # its session is over
        world.log.fail_commits(0)
        world.rules = rules_of(OTHER)
        async with running(world, world.worker(control)):
            await asyncio.sleep(60)
            assert scene.delivered("audit") == [1] * 4 + [2] * 4
            world.rules = rules_of(OTHER, a_route())
        assert await scene.counts() == {Fate.UNDELIVERED: 8}


@virtual
async def test_events_reread_by_new_rules_after_a_kill_are_delivered() -> None:
    """The kill comes after a reload, and before a commit of what the old rules had routed."""
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        world.log.fail_commits()
        doomed = world.worker(control)
        task = asyncio.create_task(doomed.run())
        await asyncio.sleep(1)
        await scene.events(8)
        scene.reload(doomed, OTHER, a_route())
        await asyncio.sleep(1)
        assert await scene.counts() == {Fate.UNDELIVERED: 8}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del world.log._state.members[TOPICS.group(ROUTER_GROUP)]
        world.log.fail_commits(0)
        async with running(world, world.worker(control)):
            await asyncio.sleep(60)
            assert await scene.counts() == {Fate.ENDED: 8}
            await scene.replay()
        assert scene.delivered() == [1] * 8


@virtual
async def test_processes_with_different_rules_each_publish_their_reads() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await scene.events(20)
            newer = World(log=world.log, rules=rules_of(OTHER, a_route()), client=world.client)
            async with running(newer, newer.worker(control)):
                await asyncio.sleep(5)
                await scene.events(20)
            await scene.events(20)
        world.rules = newer.rules
        early = sum(scene.delivered())
        assert 0 < early < 20, "each of both has some partitions"
        assert await scene.counts() == {Fate.UNDELIVERED: 60 - early, Fate.ENDED: early}
        async with running(world, world.worker(control)):
            await scene.replay()
        assert scene.delivered() == [1] * 60


@virtual
async def test_a_returning_partition_is_read_on_by_its_former_rules() -> None:
    """What is under way from before stays as it was routed, though a commit would have it read again."""
    async with a_scene(OTHER, audit=[503] * 200) as scene:
        world, control = scene.world, scene.owner.control
        world.rules = rules_of(a_route("other", to=("audit",), retry=a_policy(schedule=(3.0,), max_attempts=50)))
        async with running(world, world.worker(control)) as worker:
            await scene.events(6)
            scene.reload(worker, *world.rules.routes.values(), a_route())
            for _ in range(3):
                async with running(world, world.worker(control)):
                    await asyncio.sleep(2)
        assert await scene.counts() == Counter({Fate.UNDELIVERED: 6 - sum(scene.delivered())})


@virtual
async def test_events_routed_before_any_history_are_unknown_and_skipped() -> None:
    async with a_scene(a_route()) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await scene.events(10)
        world.log.delete_below(Partition(TOPICS.control, 0), (await world.log.bounds(TOPICS.control))[0][1])
        await scene.owner.stop()
        scene.owner = Owner(world)
        await scene.owner.start()
        async with running(world, world.worker(scene.owner.control)):
            await scene.events(10)
            assert await scene.counts() == {Fate.UNKNOWN: 10, Fate.ENDED: 10}
            assert (await scene.replay()).count == 0
            await a_replay(world, "all")
            await ended(scene.owner.control, "all")
            assert await scene.counts() == {Fate.ENDED: 20}, "a replay that leaves nothing out is known to have been"
            await scene.replay("again")
        assert scene.delivered() == [2] * 20


@virtual
async def test_a_replay_whose_route_changed_meanwhile_proves_no_delivery() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(40)
            scene.reload(worker, OTHER, a_route(when="body.n < 35"))
            await a_replay(world, "x", rate=5.0)
            await asyncio.sleep(3)
            scene.reload(worker, OTHER, a_route(when="body.n < 38"))
            await ended(control, "x")
            assert set(await scene.counts()) == {Fate.UNKNOWN}


@virtual
async def test_a_replay_that_left_events_to_a_router_which_then_had_other_rules_proves_no_delivery() -> None:
    """It came before they were routed, and by the rules of that time they were going to be delivered."""
    async with a_scene(OTHER, a_route()) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await asyncio.sleep(3)
        await scene.events(8)
        assert (await scene.replay("early")).count == 0
        world.rules = rules_of(OTHER)
        async with running(world, world.worker(control)) as worker:
            await asyncio.sleep(5)
            scene.reload(worker, OTHER, a_route())
            assert await scene.counts() == {Fate.UNDELIVERED: 8}
            await scene.replay("rest")
            assert await scene.counts() == {Fate.ENDED: 8}
        assert scene.delivered() == [1] * 8


@virtual
async def test_in_a_recreated_control_topic_a_replay_proves_nothing_of_what_it_may_have_left() -> None:
    """What it knew of the routing is lost with the offsets."""
    async with a_scene(OTHER, a_route()) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await asyncio.sleep(3)
        await scene.events(8)
        assert (await scene.replay("early")).count == 0
        world.rules = rules_of(OTHER)
        async with running(world, world.worker(control)) as worker:
            await asyncio.sleep(5)
            scene.reload(worker, OTHER, a_route())
            assert await scene.counts() == {Fate.UNDELIVERED: 8}
            await asyncio.sleep(5)
            await world.log.recreate(TOPICS.control)
            await publish(world, ControlRecord(kind="kick", name="route/other", state="requested", at=now()))
            await asyncio.sleep(5)
            assert control.recreations == 1
            assert await scene.counts() == {Fate.UNKNOWN: 8}


@virtual
async def test_a_replay_that_an_older_version_began_proves_nothing_of_what_it_may_have_left() -> None:
    """Its checkpoint doesn't say what it knew of the routing; the next owner knows more."""
    async with a_scene(OTHER, a_route()) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await asyncio.sleep(3)
        await scene.events(8)
        await scene.owner.stop()
        command = await a_replay(world, "x", undelivered=True)
        begun = {f"{EVENTS}/{number}": end for number, (_, end) in (await world.log.bounds(EVENTS)).items()}
        first = next(name for name, end in begun.items() if end)
        text = routing_revision(world.rules).routes["build"]
        await publish(
            world,
            ControlRecord(
                kind="checkpoint",
                name=command.key,
                state="done",
                at=now(),
                checkpoint={first: begun[first]},
                routes=text,
            ),
        )
        world.rules = rules_of(OTHER)
        async with running(world, world.worker(control)):
            await asyncio.sleep(5)
        world.rules = rules_of(OTHER, a_route())
        scene.owner = Owner(world)
        await scene.owner.start()
        async with running(world, world.worker(scene.owner.control)):
            await ended(scene.owner.control, "x")
            await asyncio.sleep(10)
        assert await scene.counts() == {Fate.UNKNOWN: 8}
        assert sum(scene.delivered()) == 8 - begun[first]


@virtual
async def test_a_replay_during_which_the_routing_changed_proves_nothing() -> None:
    """A part of the events is judged by the rules before, a part by those after, and which isn't stored."""
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await asyncio.sleep(3)
        await scene.events(40)
        world.rules = rules_of(OTHER, a_route())
        command = await a_replay(world, "x", rate=5.0, undelivered=True)
        await asyncio.sleep(3)
        world.log.fail_commits()
        doomed = asyncio.create_task(world.worker(control).run())
        await ended(control, "x")
        doomed.cancel()
        await asyncio.gather(doomed, return_exceptions=True)
        del world.log._state.members[TOPICS.group(ROUTER_GROUP)]
        world.log.fail_commits(0)
        world.rules = rules_of(OTHER)
        async with running(world, world.worker(control)):
            await asyncio.sleep(60)
        world.rules = rules_of(OTHER, a_route())
        assert 0 < control.commands[command.key].count < 40
        assert await scene.counts() == {Fate.UNKNOWN: 40}


def two_sources(*routes: Route) -> Rules:
    """Return rules with two sources that share a topic."""
    rules = rules_of(*routes)
    gitlab = replace(rules.sources["github"], name="gitlab", path="/in/gitlab", topic=EVENTS)
    return replace(rules, sources={**rules.sources, "gitlab": gitlab})


@pytest.mark.parametrize("narrowing", ["source", "destination", "until", "since"])
def test_a_replay_that_was_narrowed_proves_nothing_of_what_it_left_out(narrowing: str) -> None:
    """Each of four kinds of deliveries has two events; a replay leaves out two kinds."""

    async def scenario() -> None:
        async with a_scene(OTHER) as scene:
            world, control = scene.world, scene.owner.control
            world.rules = two_sources(OTHER)
            async with running(world, world.worker(control)) as worker:
                await scene.events(2, source="github")
                await scene.events(2, source="gitlab")
                await asyncio.sleep(60)
                between = now()
                await asyncio.sleep(60)
                await scene.events(2, source="github")
                await scene.events(2, source="gitlab")
                world.rules = two_sources(OTHER, a_route(sources=("github", "gitlab"), to=("ci", "mirror")))
                worker.reload()
                narrowings: dict[str, dict[str, Any]] = {
                    "source": {"source": "github"},
                    "destination": {"destination": "ci"},
                    "until": {"until": between},
                    # Its partitions' clocks may have gone back: offsets alone don't say what was appended since.
                    "since": {"since": between, "starts": 0},
                }
                await a_replay(world, "narrowed", **narrowings[narrowing])
                done = await ended(control, "narrowed")
                await asyncio.sleep(10)
                assert done.count == scene.delivered("ci").count(1) + scene.delivered("mirror").count(1) == 8
                assert await scene.counts() == {Fate.ENDED: 8, Fate.UNDELIVERED: 8}
                assert (await scene.replay("rest")).count == 8
            assert scene.delivered("ci") == scene.delivered("mirror") == [1] * 8

    run(scenario())


@virtual
async def test_a_cancelled_replay_has_delivered_up_to_its_position() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(40)
            scene.reload(worker, OTHER, a_route())
            command = await a_replay(world, "x", rate=5.0)
            await asyncio.sleep(3)
            await publish(world, command.with_state("cancelled"))
            await asyncio.sleep(8)
            injected = sum(scene.delivered())
            assert 10 <= injected <= 25
            assert await scene.counts() == {Fate.UNDELIVERED: 40 - injected, Fate.ENDED: injected}
            await scene.replay("rest")
        assert scene.delivered() == [1] * 40


def test_a_killed_replay_leaves_no_queued_dead_letter_open() -> None:
    async def scenario(appends: int) -> bool:
        retry = a_policy(max_attempts=1)
        async with a_scene(a_route(retry=retry), ci=[*[500] * 8, 200]) as scene:
            world = scene.world
            async with running(world, world.worker(scene.owner.control)):
                await scene.events(8)
            await scene.owner.stop()
            await a_replay(world, undelivered=True, rate=4.0)
            mortal = MortalLog(world.log, appends=appends, is_stored=True)
            async with owning(world, mortal) as control:
                await asyncio.wait([asyncio.create_task(mortal.died.wait())], timeout=5)
            scene.owner = Owner(world)
            await scene.owner.start()
            async with running(world, world.worker(scene.owner.control)):
                await ended(scene.owner.control)
                await asyncio.sleep(10)
                assert await scene.counts() == {Fate.ENDED: 8}, f"killed at append {appends}"
            counts = scene.delivered()
            assert set(counts) <= {2, 3}
            assert counts.count(3) <= 6
            return control.commands["replay/x"].state == "requested"

    killed = [run(scenario(appends)) for appends in range(1, 14)]
    assert killed.count(True) > 8, "most of them come before its end"


def test_resolutions_of_different_dead_letters_have_different_keys() -> None:
    """As of two owners, one of which doesn't know yet that it was evicted."""
    replay = ControlRecord(kind="replay", name="x", state="requested", at=1.0)
    dead = OpenDeadLetters(route="build")
    letters = (("0@1", "0@2"), ("0@1", "0@3"), ("0@1", "0@2"))
    keys = [resolution(replay, dead, each, count=2, deliveries=2).key for each in letters]
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("is_stored", [True, False], ids=["the resolution is its last", "and the checkpoint is lost"])
def test_dead_letters_that_a_killed_replay_has_resolved_stay_resolved(*, is_stored: bool) -> None:
    """The next owner continues from the same checkpoint, and resolves others, as many."""
    count = 2 * CHECKPOINT_EVERY + 200

    async def scenario() -> None:
        async with a_scene(a_route(retry=a_policy(max_attempts=1)), ci=[*[404] * count, 200]) as scene:
            world = scene.world
            async with running(world, world.worker(scene.owner.control)):
                await scene.events(count)
                await asyncio.sleep(60)
            assert len(world.dead()) == count
            await scene.owner.stop()
            await a_replay(world, undelivered=True)
            mortal = MortalLog(world.log, appends=CHECKPOINT_EVERY + (1 if is_stored else 2), is_stored=is_stored)
            async with owning(world, mortal):
                await mortal.died.wait()
            assert len(world.log.records(TIER)) == CHECKPOINT_EVERY
            scene.owner = Owner(world)
            await scene.owner.start()
            done = await ended(scene.owner.control)
            assert len(world.log.records(TIER)) == done.count == count
            dead = await open_dead_letters(
                world.log, TOPICS, scene.owner.control, Selection(route="build", since=0.0), readable=world.log.readable
            )
            assert not dead.letters

    run(scenario())


@virtual
async def test_a_replay_of_the_undelivered_that_is_killed_skips_nothing() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(60)
            scene.reload(worker, OTHER, a_route())
            await scene.events(60)
        await scene.owner.stop()
        await a_replay(world, undelivered=True, rate=20.0)
        for appends in (5, 30):
            mortal = MortalLog(world.log, appends=appends, is_stored=True)
            async with owning(world, mortal):
                await mortal.died.wait()
        scene.owner = Owner(world)
        await scene.owner.start()
        await ended(scene.owner.control)
        async with running(world, world.worker(scene.owner.control)):
            await asyncio.sleep(10)
        counts = scene.delivered()
        assert set(counts[:60]) <= {1, 2}
        assert counts.count(2) <= 2 * 22
        assert counts[60:] == [1] * 60


async def put_customers(world: World) -> None:
    """Store twelve events of three customers, by whom their source identifies them."""
    for number in range(12):
        customer = str(number % 3)
        await world.put(
            an_event(id=event_id("github", customer), body={"customer": customer}, headers={"X-Number": str(number)})
        )


@virtual
async def test_a_duplicate_that_the_current_rules_tell_apart_is_undelivered() -> None:
    """An identity that made distinct events equal: the rules are corrected, and the dropped ones are delivered."""
    async with a_scene(a_route()) as scene:
        world = scene.world
        source = replace(world.rules.sources["github"], id=Expression("body.customer"), dedupe=3600.0)
        world.rules = replace(world.rules, sources={"github": source})
        async with running(world, world.worker(scene.owner.control)) as worker:
            await put_customers(world)
            await asyncio.sleep(3)
            assert len(world.client.made) == 3
            assert await scene.counts() == {Fate.ENDED: 12}, "they are copies still"
            for corrected in (replace(source, id=Expression("headers['x-number']")), replace(source, dedupe=None)):
                world.rules = replace(world.rules, sources={"github": corrected})
                assert await scene.counts() == {Fate.ENDED: 3, Fate.UNDELIVERED: 9}
            worker.reload()
            await scene.replay()
            assert len(world.client.made) == 12
            assert await scene.counts() == {Fate.ENDED: 12}
        ids = [one.delivery.id for one in world.stored(TIER)]
        assert len(set(ids)) == 9
        assert set(ids).isdisjoint(delivery_id(event_id("github", str(number)), "build", "ci") for number in range(3))


@virtual
async def test_a_replay_by_whose_rules_an_event_was_a_duplicate_does_not_prove_that_it_was_delivered() -> None:
    """It left the copies out, as they were ones by the identity of that time; then that is corrected."""
    async with a_scene(a_route()) as scene:
        world = scene.world
        source = replace(world.rules.sources["github"], id=Expression("body.customer"), dedupe=3600.0)
        world.rules = replace(world.rules, sources={"github": source})
        async with running(world, world.worker(scene.owner.control)) as worker:
            await put_customers(world)
            await asyncio.sleep(3)
            assert (await scene.replay("early")).count == 0
            corrected = replace(source, id=Expression("headers['x-number']"))
            world.rules = replace(world.rules, sources={"github": corrected})
            worker.reload()
            assert await scene.counts() == {Fate.ENDED: 3, Fate.UNKNOWN: 9}
            world.rules = replace(world.rules, sources={"github": source})
            assert await scene.counts() == {Fate.ENDED: 12}


# Partitions that can't be read


async def held(world: World, topic: str) -> Partition:
    """Return the first partition of a topic that has a record."""
    return next(Partition(topic, n) for n, (start, end) in (await world.log.bounds(topic)).items() if end > start)


@virtual
async def test_a_replay_reports_unreadable_dead_letters_and_a_second_one_replays_them() -> None:
    async with a_scene(a_route(retry=a_policy(max_attempts=1)), ci=[500, 500, 200]) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(6)
            letters = await held(world, TOPICS.dead)
            scene.reload(worker, a_route(to=("ci", "audit"), retry=a_policy(max_attempts=1)))
            world.log.lose_leader(letters)
            await a_replay(world, undelivered=True)
            done = await ended(control, within=20)
            assert (done.count, done.unread) == (6, 1), "what the new destination has missed, without the letters"
            assert done.detail == f"{letters.topic}/{letters.number}"
            await asyncio.sleep(10)
            world.log.find_leader(letters)
            again = await scene.replay("again")
            assert (again.count, again.unread) == (2, 0)
        assert sorted(scene.delivered()) == [1, 1, 1, 1, 2, 2], "two of them in vain at first"
        assert scene.delivered("audit") == [1] * 6


@virtual
async def test_a_replay_reports_dead_letters_of_a_newer_version() -> None:
    async with a_scene(a_route(retry=a_policy(max_attempts=1)), ci=[500] * 6) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)):
            await scene.events(6)
            assert len(world.dead()) == 6
            world.log.rewrite(TOPICS.dead, newer)
            await a_replay(world, undelivered=True)
            done = await ended(control)
            letters = [number for number, (_, end) in (await world.log.bounds(TOPICS.dead)).items() if end]
            assert (done.count, done.unread) == (0, len(letters)), "what it has left out is told"
            assert done.detail == ", ".join([f"{TOPICS.dead}/{number}" for number in letters])
            await a_replay(world, "later", undelivered=True, since=now() + 300)
            done = await ended(control, "later")
            assert (done.count, done.unread) == (0, 0), "they aren't about events that came after them"


@virtual
async def test_other_tasks_run_while_dead_letters_are_read() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 500)
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    log, selection = world.log, Selection(route="build", since=0.0)
    dead = await open_dead_letters(log, TOPICS, Control(), selection, readable=log.readable, sleep=sleep)
    assert len(dead.letters) == 500
    assert slept == [0] * (500 // RECORDS_PER_STEP)
    slept.clear()
    dead = await open_dead_letters(
        log, TOPICS, Control(), selection, readable=log.readable, sleep=sleep, is_wanted=lambda: len(slept) < 3
    )
    assert len(dead.letters) < 3 * RECORDS_PER_STEP, "nobody wants the others any more"


class SlowDeadLetters(MemoryLog):
    """A connection that reads ten dead letters a second."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        async for batch in super().scan(partition, start, end):
            for record in batch:
                await asyncio.sleep(0.1 if partition.topic == TOPICS.dead else 0.0)
                yield [record]


@virtual
async def test_a_replay_that_is_cancelled_while_it_reads_dead_letters_lets_the_next_begin() -> None:
    world = await a_world(a_route())
    await events_of(world, 3)
    await a_backlog(world, "dead", 600)
    async with owning(world, SlowDeadLetters(world.log)) as control:
        command = await a_replay(world, "long", undelivered=True)
        await asyncio.sleep(20)
        await publish(world, command.with_state("cancelled"))
        await a_replay(world, "next")
        assert (await ended(control, "next", within=20)).count == 3


@virtual
async def test_a_replays_unread_partitions_are_reported_by_its_next_owner_too() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(40)
            scene.reload(worker, OTHER, a_route())
        world.log.lose_leader(Partition(TOPICS.dead, 2))
        await a_replay(world, undelivered=True, rate=4.0)
        await asyncio.sleep(12)
        assert 10 < control.injected("replay/x") < 40
        await scene.owner.stop()
        world.log.find_leader(Partition(TOPICS.dead, 2))
        scene.owner = Owner(world)
        await scene.owner.start()
        done = await ended(scene.owner.control)
        assert (done.count, done.unread, done.detail) == (40, 1, f"{TOPICS.dead}/2")


@virtual
async def test_nothing_counts_as_a_duplicate_whose_entry_may_be_where_nobody_can_read() -> None:
    async with a_scene(a_route()) as scene:
        world, control = scene.world, scene.owner.control
        source = replace(world.rules.sources["github"], id=Expression("body.customer"), dedupe=3600.0)
        world.rules = replace(world.rules, sources={"github": source})
        async with running(world, world.worker(control)):
            for number in range(12):
                body = {"customer": str(number % 3)}
                await world.put(an_event(id=event_id("github", body["customer"]), body=body))
            await asyncio.sleep(3)
            world.rules = replace(world.rules, sources={"github": replace(source, dedupe=None)})
            entries = await held(world, TOPICS.dedupe)
            world.log.lose_leader(entries)
            assert await scene.counts() == {Fate.ENDED: 12}
            await a_replay(world, undelivered=True)
            done = await ended(control, within=20)
            assert (done.count, done.unread) == (0, 1)
            world.log.find_leader(entries)
            assert len(world.client.made) == 3
            assert await scene.counts() == {Fate.ENDED: 3, Fate.UNDELIVERED: 9}, "it has brought none of these"
            assert (await scene.replay("again")).count == 9
            assert len(world.client.made) == 12
            assert await scene.counts() == {Fate.ENDED: 12}


def newer(record: Record) -> Record:
    """Return a record as if a newer version of the gateway had written it."""
    return record._replace(headers=of_version(record.headers))


@virtual
async def test_nothing_counts_as_a_duplicate_whose_entry_a_newer_version_may_have_written() -> None:
    """As after a rollback: it was let through by that version."""
    async with a_scene(a_route()) as scene:
        world, control = scene.world, scene.owner.control
        source = replace(world.rules.sources["github"], dedupe=3600.0)
        world.rules = replace(world.rules, sources={"github": source})
        async with running(world, world.worker(control)):
            for number in range(80):
                await world.put(an_event(id=event_id("github", str(number)), body={"n": number}))
                if number == 39:
                    await asyncio.sleep(3)
                    rolled_forward = now()
            await asyncio.sleep(3)
            assert len(world.client.made) == 80
            world.log.rewrite(TOPICS.dedupe, lambda each: each if each.appended_at < rolled_forward else newer(each))
            world.rules = replace(world.rules, sources={"github": replace(source, dedupe=None)})
            assert await scene.counts() == {Fate.ENDED: 80}
            entries = [number for number, (_, end) in (await world.log.bounds(TOPICS.dedupe)).items() if end]
            await a_replay(world, undelivered=True)
            done = await ended(control)
            assert (done.count, done.unread) == (0, len(entries))
            assert done.detail == ", ".join([f"{TOPICS.dedupe}/{number}" for number in entries])
            assert len(world.client.made) == 80


def of_control_version(version: int, *kinds: str, since: float = 0.0) -> Callable[[Record], Record]:
    """Return a change of the control records of some kinds: as if another version of the gateway had written them."""

    def change(record: Record) -> Record:
        if not record.value or record.appended_at < since or not record.key.decode().startswith(kinds):
            return record
        return record._replace(value=orjson.dumps({**orjson.loads(record.value), "v": version}))

    return change


async def restarted(scene: Scene) -> Control:
    """Let a process follow the control topic anew, as after a rollback."""
    await scene.owner.stop()
    scene.owner = Owner(scene.world)
    await scene.owner.start()
    return scene.owner.control


@virtual
async def test_events_that_a_newer_version_may_have_routed_are_unknown() -> None:
    """It took over with other rules, which this version can't read after a rollback."""
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(10)
            scene.reload(worker, OTHER)
            await asyncio.sleep(60)
            rolled_forward = now()
            scene.reload(worker, OTHER, a_route())
            await scene.events(10)
        world.log.rewrite(TOPICS.control, of_control_version(9, "routed", since=rolled_forward))
        control = await restarted(scene)
        assert control.newer
        assert await scene.counts() == {Fate.UNKNOWN: 20}, "whether the first ones were done by then isn't known either"
        assert (await scene.replay()).count == 0
        async with running(world, world.worker(control)) as worker:
            await scene.events(10)
            assert await scene.counts() == {Fate.UNKNOWN: 20, Fate.ENDED: 10}, "these are routed by this version"
            scene.reload(worker, OTHER)
            await scene.events(10)
            scene.reload(worker, OTHER, a_route())
            assert await scene.counts() == {Fate.UNKNOWN: 20, Fate.ENDED: 10, Fate.UNDELIVERED: 10}
            await asyncio.sleep(3)
            published = [each for each in world.log.records(TOPICS.control) if each.key.startswith(b"routed/")]
            await asyncio.sleep(60)
            again = [each for each in world.log.records(TOPICS.control) if each.key.startswith(b"routed/")]
            assert published == again, "once"
            assert (await scene.replay("late")).count == 10
        assert scene.delivered() == [0] * 10 + [1] * 30
        world.log.rewrite(TOPICS.control, of_control_version(1, "routed"))
        await restarted(scene)
        assert await scene.counts() == {Fate.ENDED: 20, Fate.UNKNOWN: 20}, "a replay that knew less proves nothing"


@virtual
async def test_after_a_rollback_the_rules_of_before_are_published_again() -> None:
    """Else nobody could tell what is routed by them from what the newer version has routed."""
    async with a_scene(a_route()) as scene:
        world = scene.world
        async with running(world, world.worker(scene.owner.control)) as worker:
            await scene.events(5)
            rolled_forward = now()
            scene.reload(worker, OTHER)
            await scene.events(5)
        world.log.rewrite(TOPICS.control, of_control_version(9, "routed", since=rolled_forward))
        world.rules = rules_of(a_route())
        control = await restarted(scene)
        async with running(world, world.worker(control)):
            await scene.events(5)
            assert await scene.counts() == {Fate.UNKNOWN: 10, Fate.ENDED: 5}


@pytest.mark.parametrize("what", ["a replay", "its checkpoint", "a redelivery", "dead letters"])
def test_what_a_newer_version_was_told_to_deliver_is_unknown(what: str) -> None:
    async def scenario() -> None:
        failing = a_route(retry=a_policy(max_attempts=1))
        async with a_scene(failing if what == "dead letters" else OTHER, ci=[500, 500, 200]) as scene:
            world, control = scene.world, scene.owner.control
            async with running(world, world.worker(control)) as worker:
                await scene.events(2)
                scene.reload(worker, failing)
                world.client.scripts.clear()
                kinds = {"a replay": "replay/", "its checkpoint": "checkpoint/replay/", "a redelivery": "redeliver/"}
                if what == "a redelivery":
                    for number in range(2):
                        await redelivery(world, scene.put[number].id, name=f"r{number}", route="build")
                elif what == "dead letters":
                    ends = {f"{TOPICS.dead}/{n}": end for n, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
                    command = ControlRecord(kind="dead", name="d", state="requested", at=now(), checkpoint=ends)
                    await publish(world, command)
                else:
                    await a_replay(world, undelivered=True)
                await asyncio.sleep(10)
                assert await scene.counts() == {Fate.ENDED: 2}
                world.log.rewrite(TOPICS.control, of_control_version(9, kinds.get(what, "dead/")))
                await restarted(scene)
                assert await scene.counts() == {Fate.UNKNOWN: 2}
                await a_replay(world, "later", undelivered=True)
                done = await ended(scene.owner.control, "later")
                assert (done.count, done.unread, done.detail) == (0, 1, f"{TOPICS.control}/0")
                await asyncio.sleep(2 * LEADER_CLOCK_SKEW)
                scene.reload(worker, OTHER)
                await scene.events(3)
                scene.reload(worker, failing)
                assert await scene.counts() == {Fate.UNKNOWN: 2, Fate.UNDELIVERED: 3}, "these came after it"

    run(scenario())


@virtual
async def test_a_replay_waiting_for_a_partition_has_delivered_up_to_it() -> None:
    async with a_scene(OTHER) as scene:
        world, control = scene.world, scene.owner.control
        async with running(world, world.worker(control)) as worker:
            await scene.events(40)
            scene.reload(worker, OTHER, a_route())
            await a_replay(world, "all")
            lost = Partition(EVENTS, 1)
            world.log.lose_leader(lost)
            await asyncio.sleep(20)
            brought = sum(scene.delivered())
            assert 0 < brought < 40
            assert control.commands["replay/all"].is_pending
            await a_replay(world, "rest", undelivered=True)
            assert (await ended(control, "rest", within=20)).count == 0
            world.log.find_leader(lost)
            await ended(control, "all", within=20)
            await asyncio.sleep(10)
            assert await scene.counts() == {Fate.ENDED: 40}
        assert scene.delivered() == [1] * 40


@virtual
async def test_a_dead_letter_of_another_event_of_the_identity_stays_open() -> None:
    async with a_scene(a_route(retry=a_policy(max_attempts=1)), ci=[500, 500, *[200] * 10]) as scene:
        async with running(scene.world, scene.world.worker(scene.owner.control)):
            events = []
            for number in range(2):
                events.append(an_event(id="evt_shared", body={"n": number}, received_at=now()))
                await scene.world.put(events[-1])
                await asyncio.sleep(3)
            assert len(scene.world.dead()) == 2
            await a_replay(scene.world, "x", undelivered=True, until=events[1].received_at)
            assert (await ended(scene.owner.control, "x")).count == 1
            await asyncio.sleep(10)
        log = scene.world.log
        selection = Selection(route="build", since=0.0)
        left = await open_dead_letters(log, TOPICS, scene.owner.control, selection, readable=log.readable)
        assert [received_at for _, received_at, _ in left.letters] == [events[1].received_at]


def reached_by_replay(world: World) -> set[str]:
    """Return the ids of the events that a replay has injected so far."""
    return {stored.delivery.event.id for stored in world.stored(TOPICS.retry("5s")) if stored.metadata.replay == "x"}


@pytest.mark.parametrize("action", ["drop", "replay"])
def test_a_replay_leaves_out_the_dead_letters_that_a_command_resolves_before_it_reaches_them(action: str) -> None:
    async def scenario() -> None:
        async with (
            a_scene(a_route(retry=a_policy(max_attempts=1)), ci=[500] * 4 + [200]) as scene,
            running(scene.world, scene.world.worker(scene.owner.control)),
        ):
            world = scene.world
            await scene.events(4)
            await a_replay(world, "x", undelivered=True, rate=0.5)
            await asyncio.sleep(3)
            reached = reached_by_replay(world)
            assert 0 < len(reached) < 4
            others = tuple(each.delivery.id for each in world.dead() if each.delivery.event.id not in reached)
            command = await a_command(world, "dead", name="d", action=action, filter=DeadFilter(ids=others))
            done = await ended(scene.owner.control, "x")
            assert (done.count, scene.owner.control.commands[command.key].count) == (len(reached), len(others))
            await asyncio.sleep(10)
            again = [event for event, count in zip(scene.put, scene.delivered(), strict=True) if count == 2]
            assert {event.id for event in again} == (reached if action == "drop" else {event.id for event in scene.put})
            assert await scene.counts() == {Fate.ENDED: 4}

    run(scenario())


@virtual
async def test_a_replay_leaves_out_what_is_redelivered_before_it_reaches_it() -> None:
    async with (
        a_scene(OTHER) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        world = scene.world
        await scene.events(4)
        scene.reload(worker, OTHER, a_route())
        await asyncio.sleep(3)
        await a_replay(world, "x", undelivered=True, rate=0.5)
        await asyncio.sleep(3)
        reached = reached_by_replay(world)
        others = [event.id for event in scene.put if event.id not in reached]
        assert 0 < len(others) < 4
        for event in others:
            await redelivery(world, event, name=event, route="build")
        assert (await ended(scene.owner.control, "x")).count == len(reached)
        await asyncio.sleep(10)
        assert scene.delivered() == [1] * 4
