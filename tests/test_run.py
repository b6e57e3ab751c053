"""What a process does with new rules: which it refuses, and which of those it will look at again by itself."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from typing_extensions import override

from gateway.log.base import TopicSpec
from gateway.model import GatewayError, LogUnavailableError, UsageError
from gateway.rules.load import load_rules
from gateway.run import Gateway
from gateway.settings import EmbeddedTarget, Settings
from tests.engine.test_worker import QUIET
from tests.memory_log import MemoryLog

SOURCE = "version: 1\nsources:\n  crm: {verify: {scheme: none}}\n"
NEW = "  shop: {verify: {scheme: none}}\n"


class Closed(MemoryLog):
    """A log in which no topic can be made."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__()
        self.error = error

    @override
    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        raise self.error


def taken(folder: Path, text: str, log: MemoryLog) -> bool:
    """Let a gateway that runs with SOURCE find other rules; return whether it is done with them, taken or refused."""
    file = folder / "routes.yaml"
    file.write_text(SOURCE)
    gateway = Gateway(Settings(rules=file, log=EmbeddedTarget(folder / "log.db")), QUIET)
    gateway._in_force(load_rules(file), {})
    file.write_text(text)
    is_over = asyncio.run(gateway._try_to_reload(log))
    in_force = gateway._rules.sources.keys()
    assert in_force == ({"crm", "shop"} if text == SOURCE + NEW and not isinstance(log, Closed) else {"crm"})
    return is_over


def test_rules_that_are_in_force_are_not_looked_at_again(tmp_path: Path) -> None:
    assert taken(tmp_path, SOURCE + NEW, MemoryLog())


@pytest.mark.parametrize(
    "text",
    [
        SOURCE + "destination: {}\n",
        SOURCE + "  shop: {verify: {scheme: none}, topic: gateway.dead}\n",
    ],
)
def test_rules_that_are_at_fault_themselves_are_not_looked_at_again(tmp_path: Path, text: str) -> None:
    assert taken(tmp_path, text, MemoryLog())


@pytest.mark.parametrize("error", [LogUnavailableError("no answer"), UsageError("TopicAuthorizationFailed")])
def test_rules_that_the_log_was_in_the_way_of_are_looked_at_again(tmp_path: Path, error: GatewayError) -> None:
    assert not taken(tmp_path, SOURCE + NEW, Closed(error))
