"""Which topics there are."""

import re

import pytest

from gateway.log.kafka.topic_settings import exact_partition_problems, settings_of
from gateway.log.topics import TIERS, Topics
from gateway.model import RulesError


def test_a_tier_keeps_its_records_for_a_week_longer_than_its_delay() -> None:
    specs = {spec.name: spec for spec in Topics("x.").specs(["x.events.github"])}
    for tier, delay in TIERS.items():
        assert specs[f"x.retry.{tier}"].retention == delay + 7 * 86400


def test_a_topic_that_is_kept_for_an_hour_has_segments_that_are_shorter() -> None:
    """Kafka deletes whole segments, and not the one that it writes to: for a week, by default."""
    specs = {spec.name: settings_of(spec, 3) for spec in Topics("x.").specs([], has_responses=True)}
    assert {name: found["segment.ms"] for name, found in specs.items() if "segment.ms" in found} == {
        "x.responses": "600000"
    }


def test_sources_that_share_a_topic_have_one() -> None:
    names = [spec.name for spec in Topics().specs(["shared", "shared", "gateway.events.a"])]
    assert names[:2] == ["gateway.events.a", "shared"]


@pytest.mark.parametrize(
    "name",
    [
        "gateway.dead",
        "gateway.control",
        "gateway.retry.5s",
        "gateway.parked",
        "gateway.dedupe",
        "gateway.ordered.build.TO.ci",
    ],
)
def test_events_never_share_a_topic_of_the_gateways_own(name: str) -> None:
    with pytest.raises(RulesError, match="expected a name for events"):
        Topics().specs(["gateway.events.github", name])


def test_the_control_topic_alone_has_to_keep_one_partition() -> None:
    """All but the first partition of it would be ignored: no command would be read there."""
    specs = Topics("x.").specs(["x.events.github"], [("build", "ci")])
    grown = {spec.name: list(exact_partition_problems(spec, spec.partitions + 1)) for spec in specs}
    (problem,) = grown.pop("x.control")
    assert problem.startswith("partitions: expected exactly 1, got 2; records in other partitions are ignored")
    assert not any(grown.values())
    assert not [problem for spec in specs for problem in exact_partition_problems(spec, spec.partitions)]


@pytest.mark.parametrize("place", [("build", "ci"), ("a.to.b", "c"), ("a", "to.b.c"), ("a_b", "c"), ("x-1", "y..z")])
def test_an_ordered_routes_topic_names_its_target(place: tuple[str, str]) -> None:
    topics = Topics("x.")
    topic = topics.ordered(*place)
    assert topics.ordered_target(topic) == place
    assert re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", topic)
    assert [
        topics.ordered_target(name) for name in (topics.events("github"), topics.dead, "x.ordered.a", "a.TO.b")
    ] == [None] * 4


def test_the_longest_names_make_a_topic_that_kafka_takes() -> None:
    assert len(Topics("gateway." * 8).ordered("r" * 63, "d" * 63)) <= 249
