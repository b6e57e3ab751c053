"""Twenty people who look at once, with ten thousand routes: each gets their page, and the event loop isn't held.

How long a step of the event loop takes is measured in processor time of its thread, which other programs on the machine
don't lengthen as they do seconds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from gateway.access.principal import AccessRole, Principal
from gateway.api import cache
from gateway.api.backend import Backend
from gateway.console.asking import Asking
from tests.console.conftest import Console, console_of
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

LARGE, MANY = 10_000, 20
LONGEST = 0.03
"""Seconds of the processor that a step of the event loop may take. Where two hundred routes' traffic was made into an
answer there, it took 40 to 90 ms."""
ROUTES = "".join(
    [f"  - {{name: r{number:05}, from: github, to: ci, owner: team-{number % 2}}}\n" for number in range(LARGE)]
)
RULES = f"""
version: 1
sources:
  github: {{path: /github, verify: {{scheme: token, header: X-Token, secrets: ["${{TOKEN}}"]}}}}
destinations:
  ci: {{url: "https://ci.example/"}}
routes:
{ROUTES}"""
LIMITS: tuple[dict[str, frozenset[str]], ...] = ({}, {"owners": frozenset({"team-1"})})
PAGES = ("", "/rules", "/routes", "/destinations", "/routes/r00001")
ANSWERS = (
    "/findings",
    "/traffic",
    "/traffic?destination=ci",
    "/routes?traffic=true&limit=200",
    "/destinations?traffic=true",
    "/rules/file?traffic=true&limit=500",
    "/deliveries?status=dead",
    "/dead-letters?limit=200",
    "/status",
    "/spools",
)


@pytest.fixture
async def large(tmp_path: Path) -> AsyncIterator[Console]:
    """A console with ten thousand routes, of which each has had an event, and one in ten has failed."""
    company = await Company.found(MemoryLog(now=Ticking()))
    async with console_of(company, tmp_path, RULES) as console:
        for number in range(LARGE):
            event, *_ = await company.event()
            name = f"r{number:05}"
            if number % 10:
                await company.attempt(event, route=name)
            else:
                await company.die(event, route=name)
        await console.refresh()
        yield console


async def looked(console: Console, path: str) -> str:
    async with console.client.get(path) as response:
        text = await response.text()
        assert response.status == 200, (path, response.status, text[:2000])
        return text


@contextmanager
def steps() -> Iterator[list[tuple[float, str]]]:
    """Collect how long each step of the event loop takes, and what it is of; each may be put off by others."""
    taken: list[tuple[float, str]] = []
    run = asyncio.events.Handle._run

    def measured(handle: asyncio.events.Handle) -> None:
        task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
        began = time.thread_time()
        run(handle)
        took = time.thread_time() - began
        taken.append((took, str(task.get_coro()) if isinstance(task, asyncio.Task) else str(handle)))

    asyncio.events.Handle._run = measured  # type: ignore[method-assign, assignment]
    try:
        yield taken
    finally:
        asyncio.events.Handle._run = run  # type: ignore[method-assign]


@pytest.mark.usefixtures("no_collection")  # of what other tests have left: it would count as a step's
@pytest.mark.timeout(240)
@pytest.mark.rotated(share=1 / 6, group="browser")
@pytest.mark.parametrize("limits", LIMITS, ids=["all", "limited"])
async def test_many_who_look_at_once_get_their_pages_and_hold_nothing_up(
    large: Console, limits: dict[str, frozenset[str]]
) -> None:
    large.become(AccessRole.OPERATOR, **limits)
    for path in [*[f"/ui{page}" for page in PAGES], *[f"/api/v1{answer}" for answer in ANSWERS]]:
        as_after_a_start(large.backend)
        large.access.others = (f"person {number}" for number in count())
        with steps() as taken:
            found = await asyncio.gather(*[looked(large, path) for _ in range(MANY)])
        assert not [text for text in found if "got too many" in text or "got none: try again" in text]
        longest = max(taken)
        assert longest[0] < LONGEST, (path, limits, longest)


def as_after_a_start(backend: Backend) -> None:
    """Let a process forget which rules it has looked over."""
    backend._overview = None


async def test_what_is_counted_for_some_isnt_shown_to_others(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "QUICK", -1.0)
    monkeypatch.setattr(cache, "SHARE", 1e9)  # everything is kept
    seeing: tuple[tuple[AccessRole, dict[str, frozenset[str]]], ...] = (
        (AccessRole.VIEWER, {}),
        (AccessRole.READER, {}),
        (AccessRole.VIEWER, {"sources": frozenset({"github"})}),
        (AccessRole.VIEWER, {"owners": frozenset({"github"})}),
        (AccessRole.VIEWER, {"sources": frozenset({"stripe"})}),
    )
    for number, (role, limits) in enumerate(seeing):

        async def read(own: int = number) -> int:
            return own

        for name in ("ada", "eve"):
            principal = Principal(name=name, role=role, via="test", **limits)
            asking = Asking(backend=console.backend, principal=principal, now=0.0)
            assert await asking.share("figures", read) == number
