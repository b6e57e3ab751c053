"""A route whose events name their destination: what names none, what is declared later, and what replays make of it."""

import asyncio
from collections import Counter
from dataclasses import replace

from gateway.engine.control.records import DeadFilter
from gateway.engine.jobs.undelivered import Fate
from gateway.rules.destination_choice import DestinationChoice, fitting
from gateway.rules.rules import Route
from gateway.rules.templates import Template
from tests.builders import a_route, an_event
from tests.engine.test_jobs import a_command, ended
from tests.engine.test_undelivered import Scene, a_scene
from tests.engine.test_worker import TOPICS, a_world, running, virtual
from tests.virtual_time import now

NAME = Template("tenant-${{ body.tenant }}")


def a_choice(*declared: str, fixed: tuple[str, ...] = ("audit",), otherwise: str | None = None) -> Route:
    """Make a route whose events go to the fixed destinations, and to one of the declared ones."""
    candidates = fitting(NAME, declared)
    choice = DestinationChoice(name=NAME, candidates=frozenset(candidates), otherwise=otherwise)
    to = (*fixed, *candidates, *([otherwise] if otherwise else []))
    return replace(a_route(to=to), choice=choice, fixed=fixed)


async def put(scene: Scene, *tenants: str) -> None:
    made = [
        an_event(id=f"evt_{len(scene.put) + number}", body={"tenant": tenant}, received_at=now())
        for number, tenant in enumerate(tenants)
    ]
    scene.put += made
    await scene.world.put(*made)
    await asyncio.sleep(3)


def letters(scene: Scene) -> list[tuple[str, str, str, str]]:
    """Return the dead letters: event, destination, reason, detail."""
    dead = scene.world.dead()
    return sorted(
        (each.delivery.event.id, each.delivery.destination, each.metadata.dead_reason, each.metadata.detail)
        for each in dead
    )


@virtual
async def test_each_event_goes_where_it_says_and_is_done() -> None:
    world = await a_world(a_choice("tenant-a", "tenant-b"))
    events = [
        an_event(id=f"evt_{number}", body={"tenant": "ab"[number % 2]}, received_at=now()) for number in range(40)
    ]
    await world.put(*events)
    async with running(world):
        await asyncio.sleep(3)
    made = Counter((name, event) for name, event, _ in world.client.made)
    assert made == Counter(
        [(f"tenant-{'ab'[number % 2]}", f"evt_{number}") for number in range(40)]
        + [("audit", f"evt_{number}") for number in range(40)]
    )
    assert await world.unfinished() == 0


@virtual
async def test_an_event_that_names_no_declared_destination_is_a_dead_letter() -> None:
    async with a_scene(a_choice("tenant-a")) as scene, running(scene.world, scene.world.worker(scene.owner.control)):
        await put(scene, "a", "c")
    assert scene.delivered("tenant-a") == [1, 0]
    assert scene.delivered("audit") == [1, 1], "what has nothing to do with the name arrives"
    assert letters(scene) == [
        ("evt_1", "", "unknown_destination", "to: expected the name of a declared destination, got another")
    ]
    assert await scene.world.unfinished() == 0


@virtual
async def test_a_dead_letter_goes_where_its_event_says_once_that_is_declared() -> None:
    async with (
        a_scene(a_choice("tenant-a")) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "c", "d")
        scene.reload(worker, a_choice("tenant-a", "tenant-c"))
        command = await a_command(scene.world, "dead", action="replay", filter=DeadFilter(reason="unknown_destination"))
        done = await ended(scene.owner.control, command)
        assert done.count == 2
        await asyncio.sleep(10)
        assert scene.delivered("tenant-c") == [1, 0]
        assert scene.delivered("audit") == [1, 1], "it isn't delivered again where it was"
        assert [event for event, *_ in letters(scene)] == ["evt_0", "evt_1", "evt_1"]
        assert await scene.counts() == {Fate.ENDED: 3, Fate.UNDELIVERED: 1}, "what was replayed isn't undelivered"
        assert await scene.world.unfinished(TOPICS.retry("5s")) == 0


@virtual
async def test_a_dead_letter_goes_where_every_event_goes_by_now() -> None:
    """The route that named nothing for it had other destinations than the one that replays it."""
    async with (
        a_scene(a_choice("tenant-a")) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "c")
        scene.reload(worker, a_choice("tenant-a", "tenant-c", fixed=("audit", "tenant-c")))
        command = await a_command(scene.world, "dead", action="replay", filter=DeadFilter())
        await ended(scene.owner.control, command)
        await asyncio.sleep(10)
        assert scene.delivered("tenant-c") == [1]
        assert await scene.world.unfinished(TOPICS.retry("5s")) == 0


@virtual
async def test_a_dead_letter_waits_for_its_route_to_come_back() -> None:
    async with (
        a_scene(a_choice("tenant-a")) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "c")
        scene.reload(worker, a_route("other", to=("audit",)))
        command = await a_command(scene.world, "dead", action="replay", filter=DeadFilter())
        await ended(scene.owner.control, command)
        await asyncio.sleep(90)
        assert scene.delivered("tenant-c") == [0]
        scene.reload(worker, a_choice("tenant-a", "tenant-c"))
        await asyncio.sleep(90)
        assert scene.delivered("tenant-c") == [1]
        assert scene.delivered("audit") == [1]
        assert len(letters(scene)) == 1


@virtual
async def test_a_dead_letter_of_a_route_that_no_longer_chooses_goes_where_all_go() -> None:
    async with (
        a_scene(a_choice("tenant-a", fixed=())) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "c")
        scene.reload(worker, a_route(to=("ci", "audit")))
        command = await a_command(scene.world, "dead", action="replay", filter=DeadFilter())
        await ended(scene.owner.control, command)
        await asyncio.sleep(10)
        assert (scene.delivered("ci"), scene.delivered("audit")) == ([1], [1])


@virtual
async def test_a_replay_of_the_undelivered_takes_what_was_named_too_early() -> None:
    async with (
        a_scene(a_choice("tenant-a")) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "a", "c")
        scene.reload(worker, a_choice("tenant-a", "tenant-c"))
        await asyncio.sleep(3)
        await scene.replay()
        assert scene.delivered("tenant-a") == [1, 0]
        assert scene.delivered("tenant-c") == [0, 1]
        assert scene.delivered("audit") == [1, 1]
        assert scene.resolved_by("x") == [1], "the dead letter isn't open any more"


@virtual
async def test_a_replay_of_the_undelivered_to_one_destination_takes_what_named_it_too_early() -> None:
    async with (
        a_scene(a_choice("tenant-a")) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene, "a", "c", "d")
        scene.reload(worker, a_choice("tenant-a", "tenant-c", "tenant-d"))
        await asyncio.sleep(3)
        assert await scene.counts(destination="tenant-c") == {Fate.UNDELIVERED: 1}
        assert await scene.counts(destination="audit") == {Fate.ENDED: 3}
        done = await scene.replay(destination="tenant-c")
        assert done.count == 1
        assert [scene.delivered(name) for name in ("tenant-c", "tenant-d")] == [[0, 1, 0], [0, 0, 0]]
        assert scene.resolved_by("x") == [1]
        assert (await scene.replay("others")).count == 1
        assert scene.delivered("tenant-d") == [0, 0, 1]


@virtual
async def test_a_replay_of_a_route_takes_only_what_no_route_above_it_takes() -> None:
    first = replace(a_route("first", match={"body.n": 0}, to=("audit",)), stop=True)
    async with (
        a_scene(first, a_route()) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await scene.events(4)
        assert scene.delivered("ci") == [0, 1, 1, 1]
        assert await scene.counts() == {Fate.ENDED: 3}
        other = replace(first, match=None)
        scene.reload(worker, other, a_route())
        await scene.events(2)
        assert scene.delivered("ci") == [0, 1, 1, 1, 0, 0]
        assert await scene.counts() == {}, "none matches any more"
        scene.reload(worker, a_route())
        await asyncio.sleep(3)
        counts = await scene.counts()
        assert counts == {Fate.UNKNOWN: 6}, "which of them the other routes had taken isn't known any more"
