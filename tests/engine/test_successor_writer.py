"""A successor is retried until it is stored; none is started that another owner may start as well."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typing_extensions import override

from gateway.engine.successor_writer import LONGEST_PAUSE, SuccessorWriter
from gateway.log.base import Position
from gateway.log.topics import Topics
from gateway.model import NO_METADATA, Delivery, DeliveryId, LogUnavailableError
from gateway.telemetry.metrics import Metrics
from tests.builders import a_route, an_event
from tests.engine.test_worker import QUIET, rules_of
from tests.memory_log import MemoryLog
from tests.virtual_time import run


class Away(MemoryLog):
    """A log that takes nothing until it `is_back`, and counts what was tried."""

    def __init__(self) -> None:
        super().__init__()
        self.is_back = False
        self.tries = 0

    @override
    async def append(self, topic: str, **_: Any) -> Position:
        self.tries += 1
        if not self.is_back:
            raise LogUnavailableError("away")
        return Position(0, self.tries, 0.0)


class Scene:
    """A successor on its way, of a record whose owner changes."""

    def __init__(self) -> None:
        self.log = Away()
        self.is_lost = self.is_undecided = False
        self.sleeps = 0
        self.topic = Topics("gateway.").retry("5s")

    async def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        await asyncio.sleep(seconds)

    async def store(self) -> bool:
        successors = SuccessorWriter(
            log=self.log,
            topics=Topics("gateway."),
            rules=lambda: rules_of(a_route()),
            metrics=Metrics(CollectorRegistry()),
            logger=QUIET,
            sleep=self.sleep,
        )
        delivery = Delivery(id=DeliveryId("dlv_1"), event=an_event(), route="build", destination="ci")
        return await successors.store(
            self.topic, delivery, NO_METADATA, lambda: not self.is_lost, lambda: self.is_undecided
        )


def played(change: Callable[[Scene], None], *, then: Callable[[Scene], None]) -> tuple[bool, int]:
    """Let a change come between two tries, and one more after a minute; return what came of it, and the tries since."""

    async def scenario() -> tuple[bool, int]:
        scene = Scene()
        task = asyncio.create_task(scene.store())
        await asyncio.sleep(60)
        assert scene.log.tries > 60 / LONGEST_PAUSE
        tries = scene.log.tries
        change(scene)
        scene.log.is_back = True
        await asyncio.sleep(60)
        then(scene)
        is_stored = await asyncio.wait_for(task, 60)
        return is_stored, scene.log.tries - tries

    return run(scenario())


def lost(scene: Scene) -> None:
    scene.is_lost, scene.is_undecided = True, False


def opened(scene: Scene) -> None:
    scene.is_undecided = True


def ours(scene: Scene) -> None:
    scene.is_undecided = False


@pytest.mark.parametrize(
    ("change", "then", "expected"),
    [
        pytest.param(ours, ours, (True, 1), id="the log is back"),
        pytest.param(lost, lost, (False, 0), id="another's between two tries"),
        pytest.param(opened, lost, (False, 0), id="open for a minute, then another's"),
        pytest.param(opened, ours, (True, 1), id="open for a minute, then ours again"),
    ],
)
def test_none_is_begun_that_another_owner_may_begin(
    change: Callable[[Scene], None], then: Callable[[Scene], None], expected: tuple[bool, int]
) -> None:
    assert played(change, then=then) == expected


def test_an_unknown_name_is_looked_up_less_and_less_often() -> None:
    """Thousands of appends may wait for it at once, in the loop that also answers senders."""

    async def scenario() -> int:
        scene = Scene()
        opened(scene)
        task = asyncio.create_task(scene.store())
        await asyncio.sleep(60)
        lost(scene)
        assert not await task
        return scene.sleeps

    assert run(scenario()) < 70
