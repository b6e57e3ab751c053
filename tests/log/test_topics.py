"""Which topics there are."""

import pytest

from gateway.log.topics import TIERS, Topics
from gateway.model import RulesError


def test_a_tier_keeps_its_records_for_a_week_longer_than_its_delay() -> None:
    specs = {spec.name: spec for spec in Topics("x.").specs(["x.events.github"])}
    for tier, delay in TIERS.items():
        assert specs[f"x.retry.{tier}"].retention == delay + 7 * 86400


def test_sources_that_share_a_topic_have_one() -> None:
    names = [spec.name for spec in Topics().specs(["shared", "shared", "gateway.events.a"])]
    assert names[:2] == ["gateway.events.a", "shared"]


@pytest.mark.parametrize(
    "name", ["gateway.dead", "gateway.control", "gateway.retry.5s", "gateway.parked", "gateway.dedupe"]
)
def test_events_never_share_a_topic_of_the_gateways_own(name: str) -> None:
    with pytest.raises(RulesError, match="expected a name for events"):
        Topics().specs(["gateway.events.github", name])
