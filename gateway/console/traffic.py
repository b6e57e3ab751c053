"""The traffic of a page: of now, the last hour and the last day."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from gateway.api.problems import ApiError
from gateway.api.traffic import TrafficAnswer, get_traffic
from gateway.api.traffic_shapes import Traffic
from gateway.console.asking import Asking
from gateway.ops.output import rfc3339

PERIODS = (("Now", 300.0, "5m"), ("Last hour", 3600.0, "5m"), ("Last day", 86_400.0, "1h"))
"""What it is called, for how many seconds before now, and in which steps. It begins with one: it's up to one longer."""


class Period(NamedTuple):
    """Some time, and its traffic."""

    label: str
    traffic: Traffic


async def periods(asking: Asking, **which: str) -> Sequence[Period] | ApiError:
    """Return the traffic of now, the last hour and the last day, in this order; or why it can't be told."""
    found = await asyncio.gather(
        *[
            asking.try_asking(get_traffic, **which, since=rfc3339(asking.now - seconds), step=step)
            for _, seconds, step in PERIODS
        ]
    )
    told: list[Period] = []
    for (label, _, _), each in zip(PERIODS, found, strict=True):
        if not isinstance(each, TrafficAnswer):
            return each
        told.append(Period(label, each.traffic))
    return told
