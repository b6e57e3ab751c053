"""What every test has: an event loop that nothing blocks and no task outlives; and, where it asks for one, a broker."""

import asyncio
import gc
import inspect
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from math import ceil
from typing import Any, TypeVar

import hypothesis
import pytest
import structlog
from blockbuster import blockbuster_ctx

from dev.kafka import Broker, KafkaMissingError
from tests.run_seeds import VARIABLE, drawn

T = TypeVar("T")

hypothesis.settings.register_profile("steady", deadline=None)  # how busy the machine is isn't what a property is about
hypothesis.settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the sizes that the promises are stated for: minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long, and runs with --full alone")
    config.addinivalue_line("markers", "alone: compares times of milliseconds: `make test` runs nothing beside it")
    config.addinivalue_line(
        "markers",
        "rotated(share=1/3, group=None): of the function's cases, or of all tests with this group, a run takes this "
        "share, drawn from the commit; --full, and whoever names tests, takes all",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect 17,000 tests without the garbage collector, which would traverse them again and again; now and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left_out = {item for item in items if item.get_closest_marker("full")}
        if not config.option.keyword and not any("::" in argument for argument in config.args):
            left_out |= out_of_turn([item for item in items if item not in left_out])
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def out_of_turn(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the rotated tests that aren't of this commit's share."""
    groups: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    shares: dict[tuple[str, str], float] = {}
    for item in items:
        if marker := item.get_closest_marker("rotated"):
            named: str | None = marker.kwargs.get("group")
            function = getattr(item, "originalname", None) or item.name
            group = ("", named) if named else (item.path.as_posix(), function)
            groups[group].append(item)
            shares[group] = marker.kwargs.get("share", 1 / 3)
    left_out: set[pytest.Item] = set()
    for group, its in groups.items():
        taken = random.Random(f"{drawn()} {group[1]}").sample(its, ceil(len(its) * shares[group]))
        left_out |= set(its).difference(taken)
    return left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"seeds from {drawn()} on, drawn from the commit; {VARIABLE} names others")


@pytest.fixture
def is_full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Collect nothing, and let `gc.get_objects` return only what is created from now on."""
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """Return `host:port` of a broker: that of GATEWAY_TEST_KAFKA, or one that is started when the first test asks."""
    if given := os.environ.get("GATEWAY_TEST_KAFKA"):
        yield given
        return
    broker = start_broker()
    yield broker.address
    broker.stop()


def start_broker(settings: Mapping[str, str] | None = None, port: int | None = None, **more: Any) -> Broker:
    """Start a broker, as `start_kafka` does; `more` is what else `Broker.start` takes."""
    return start_kafka(lambda: Broker.start(port=port, settings=settings, **more))


def start_kafka(start: Callable[[], T]) -> T:
    """Start what needs Kafka, or skip the test where this machine can't; with CI=true that is a failure."""
    try:
        return start()
    except KafkaMissingError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def the_loop_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an asynchronous test in which our code blocks the loop, or which leaves a task behind."""
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    request.getfixturevalue("no_task_is_left")
    with blockbuster_ctx("gateway"):
        yield


@pytest.fixture
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:  # What was cancelled, or whose peer has just gone, ends by itself.
        _, left = await asyncio.wait(left, timeout=0.5)
    assert not left, f"expected no task after the test, got {left}"


@pytest.fixture(autouse=True)
def default_logging() -> Iterator[None]:
    """Take back how a test has set up the log: by the level of a command before it, another would see no lines."""
    yield
    structlog.reset_defaults()
