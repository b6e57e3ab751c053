"""What is in the spool of the process that answers: acknowledged events that are on its disk alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.access.principal import Principal
from gateway.api.backend import Backend
from gateway.api.json_shapes import Time
from gateway.api.overview import Overview
from gateway.api.visibility import sees_source
from gateway.ops.output import rfc3339
from gateway.rules.rules import Rules

MOST_TOPICS = 200
"""Topics of a spool that are told, those that have waited for longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolTopic:
    """What waits in a spool for a topic of the log. `waits` is why it isn't moved at the moment, null if it is."""

    topic: str
    events: int
    bytes: int
    oldest: Time | None
    waits: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spool:
    """A process's spool: how many events are on its disk alone, and since when the oldest is.

    `process` is its host and the port of its admin address. `used` is the share of its nearest limit (bytes, age or
    disk). `refuses` is why it accepts no more, null if it does. `waits` is why nothing of it is moved, null if that is
    up to the topics. With limits, numbers are of the topics that are seen.
    """

    process: str
    events: int
    bytes: int
    oldest: Time | None
    used: float
    refuses: str | None
    waits: str | None
    topics: tuple[SpoolTopic, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spools:
    """The spools that the process that answers knows: its own, if it has one. Others are asked by themselves."""

    items: tuple[Spool, ...]


async def list_spools(backend: Backend, principal: Principal) -> Spools:
    """List what is in the spool of the process that answers."""
    status = backend.spool()
    if status is None:
        return Spools(items=())
    topics: list[Mapping[str, Any]] = list(status["topics"])
    if principal.is_limited:
        rules = backend.rules()
        overview = await backend.overview(rules)
        topics = [each for each in topics if _is_seen(backend, principal, rules, overview, each["topic"])]
    return Spools(items=(_spool(backend.process, status, topics, principal),))


def _is_seen(backend: Backend, principal: Principal, rules: Rules, overview: Overview, topic: str) -> bool:
    """Return whether somebody sees all sources of a topic."""
    own = topic.removeprefix(backend.topics.events(""))
    sources = overview.sources_by_topic.get(topic) or ((own,) if own in rules.sources else ())
    return bool(sources) and all(sees_source(principal, rules, source) for source in sources)


def _spool(process: str, status: Mapping[str, Any], topics: Sequence[Mapping[str, Any]], principal: Principal) -> Spool:
    waits: Mapping[str, str] = status["waits"] or {}
    oldest = min([each["oldest"] for each in topics if each["oldest"] is not None], default=None)
    refuses = status["refuses"]
    if refuses and principal.is_limited:  # which may name a topic of others
        refuses = "it accepts no more"
    return Spool(
        process=process,
        events=sum([each["events"] for each in topics]),
        bytes=sum([each["bytes"] for each in topics]),
        oldest=_time(oldest),
        used=status["used"],
        refuses=refuses,
        waits=waits.get(""),
        topics=tuple(
            [
                SpoolTopic(
                    topic=each["topic"],
                    events=each["events"],
                    bytes=each["bytes"],
                    oldest=_time(each["oldest"]),
                    waits=waits.get(each["topic"]),
                )
                for each in sorted(topics, key=_age)[:MOST_TOPICS]
            ]
        ),
    )


def _age(topic: Mapping[str, Any]) -> tuple[float, str]:
    return topic["oldest"] or float("inf"), topic["topic"]


def _time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)
