"""How a fleet is counted from what an event costs; what it costs is measured by `python -m benchmarks.scaling`."""

from dataclasses import replace

import pytest

from benchmarks.scaling import Costs, fleet_for

COSTS = Costs(ingress=60.0, event=30.0, delivery=90.0, idle=0.0, kafka=20.0, record=2_000)


def test_cores_are_rate_times_cost_and_left_room() -> None:
    fleet = fleet_for(COSTS, rate=100_000, fan_out=1)
    assert fleet.ingresses == 10, "6 cores of work, at 60 %"
    assert fleet.routers == 20, "12 cores of work, at 60 %"
    assert fleet.kafka_cores == 10, "2 cores of work for each of three replicas"


def test_further_deliveries_cost_the_routers_alone() -> None:
    one, three = [fleet_for(COSTS, rate=100_000, fan_out=fan_out) for fan_out in (1, 3)]
    assert (three.ingresses, three.kafka_cores) == (one.ingresses, one.kafka_cores)
    assert three.routers == 50
    assert three.megabytes_out == 3 * one.megabytes_out == 3 * one.megabytes_in == pytest.approx(600)


def test_a_routers_idle_cost_is_not_left_for_deliveries() -> None:
    assert fleet_for(replace(COSTS, idle=200_000.0), rate=100_000, fan_out=1).routers == 30


def test_partitions_are_enough_for_every_router_and_for_the_rate() -> None:
    assert fleet_for(COSTS, rate=100_000, fan_out=1).partitions == 50
    assert fleet_for(COSTS, rate=100_000, fan_out=3).partitions == 100


def test_the_smallest_fleet_is_one_of_each() -> None:
    fleet = fleet_for(COSTS, rate=1, fan_out=1)
    assert (fleet.ingresses, fleet.routers, fleet.kafka_cores, fleet.partitions) == (1, 1, 1, 2)
