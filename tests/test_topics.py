"""What a process makes of topics that aren't as they have to be."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs
from typing_extensions import override

from gateway.log.base import Commit, Partition, TopicProblem, TopicSpec
from gateway.model import LogUnavailableError, UsageError
from gateway.required_topics import ensure_topics
from gateway.rules.load import load_rules
from gateway.settings import Settings
from tests.memory_log import MemoryLog

LOSES = TopicProblem(topic="gateway.dead", message="retention", is_fatal=True)
NAMED = "version: 1\nsources: {crm: {verify: {scheme: none}, topic: acme.hooks}}\n"
GONE = TopicProblem(topic="gateway.retry.20h", message="expected a topic, got none", is_fatal=True, is_missing=True)
NEVER_SET_UP = replace(GONE, topic="gateway.control")
STRANDS = TopicProblem(topic="gateway.control", message="partitions", is_fatal=True, is_tolerable=False)


class Differing(MemoryLog):
    def __init__(self, *problems: TopicProblem) -> None:
        super().__init__()
        self._problems = problems

    @override
    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        return self._problems


@pytest.mark.parametrize(
    ("problems", "dev", "refused"),
    [
        ([LOSES], False, r"gateway\.dead: retention\nrun .*--dev.*"),
        ([LOSES], True, None),
        ([STRANDS], False, r"gateway\.control: partitions"),
        ([STRANDS, LOSES], True, r"gateway\.control: partitions"),
        ([], False, None),
    ],
)
def test_dev_mode_warns_of_lost_events_but_refuses_what_is_worse(
    tmp_path: Path, problems: Sequence[TopicProblem], refused: str | None, *, dev: bool
) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("version: 1\nsources: {crm: {verify: {scheme: none}}}\n")
    settings, rules, logger = Settings(dev=dev), load_rules(file), structlog.get_logger()
    with capture_logs() as lines:
        expected = nullcontext() if refused is None else pytest.raises(UsageError, match=rf"\A{refused}\Z")
        with expected:
            asyncio.run(ensure_topics(Differing(*problems), settings, rules, logger, is_start=True))
    warned = [line["topic"] for line in lines if line["event"] == "topic_misconfigured"]
    assert warned == (["gateway.dead"] if dev else [])


@pytest.mark.parametrize(
    ("problems", "is_start", "refused"),
    [
        ([GONE], True, None),
        ([GONE, NEVER_SET_UP], True, r"gateway\.retry\.20h: .*\ngateway\.control: .*\nrun `gateway topics create`.*"),
        ([GONE, NEVER_SET_UP], False, None),
    ],
)
def test_a_missing_topic_is_reported_and_stops_only_the_first_start(
    tmp_path: Path, problems: Sequence[TopicProblem], refused: str | None, *, is_start: bool
) -> None:
    file = tmp_path / "routes.yaml"
    file.write_text("version: 1\nsources: {crm: {verify: {scheme: none}}}\n")
    settings, rules, logger = Settings(), load_rules(file), structlog.get_logger()
    with capture_logs() as lines:
        expected = nullcontext() if refused is None else pytest.raises(UsageError, match=rf"\A{refused}\Z")
        with expected:
            asyncio.run(ensure_topics(Differing(*problems), settings, rules, logger, is_start=is_start))
    told = [] if refused is not None else [problem.topic for problem in problems]
    warned = [line for line in lines if line["event"] == "topic_misconfigured"]
    assert [line["topic"] for line in warned] == told
    assert all("run `gateway topics create`" in line["problem"] for line in warned)


@pytest.mark.parametrize("error", [UsageError("acme.hooks/0: may not read"), LogUnavailableError("no coordinator")])
def test_a_start_without_the_right_to_announce_topics_warns(tmp_path: Path, error: Exception) -> None:
    class Refusing(Differing):
        @override
        async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
            raise error

    file = tmp_path / "routes.yaml"
    file.write_text(NAMED)
    with capture_logs() as lines:
        asyncio.run(
            ensure_topics(Refusing(), Settings(), load_rules(file), structlog.get_logger(), is_start=True),
        )
    [warned] = [line for line in lines if line["event"] == "topic_misconfigured"]
    assert warned["topic"] == "acme.hooks"
    assert str(error) in warned["problem"]
