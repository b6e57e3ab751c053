"""The topics of the gateway: names, partitions, retention.

A tier is a topic whose records wait one fixed delay after their append.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.log.base import Partition, TopicSpec
from gateway.model import RulesError

DAY = 86400.0
TIERS: dict[str, float] = {
    "5s": 5.0,
    "20s": 20.0,
    "80s": 80.0,
    "5m": 300.0,
    "20m": 1200.0,
    "80m": 4800.0,
    "5h": 18000.0,
    "20h": 72000.0,
}
"""Name → delay in seconds, ascending. Each is about four times the previous one, so that any delay takes few hops."""

AUDIT_RETENTION = 365 * DAY
"""Seconds for which it is kept who has done what: longer than the accounts of most of what went wrong."""

ORDERED_PARTITIONS = 6
"""Partitions of an ordered topic that are used: however many are added, a key stays in its partition."""

CONTROL_PARTITION = 0
"""The partition of the control topic that is written and read, however many it has: commands are totally ordered."""

ROUTER_GROUP = "router"
JOBS_GROUP = "jobs"
INGRESS_GROUP = "ingress"
"""Reads nothing: its members are the ingresses that share the rates of sources."""
SOURCES_GROUP = "sources"
"""Has no members: its commits name the topics of sources with `topic`, so that each router finds them."""

_TO = ".TO."


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of topics and groups, with a common prefix."""

    prefix: str = "gateway."

    def events(self, source: str) -> str:
        return f"{self.prefix}events.{source}"

    def retry(self, tier: str) -> str:
        return f"{self.prefix}retry.{tier}"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    @property
    def parked(self) -> str:
        return f"{self.prefix}parked"

    @property
    def rejected(self) -> str:
        return f"{self.prefix}rejected"

    @property
    def dedupe(self) -> str:
        return f"{self.prefix}dedupe"

    @property
    def control(self) -> str:
        return f"{self.prefix}control"

    @property
    def responses(self) -> str:
        return f"{self.prefix}responses"

    @property
    def attempts(self) -> str:
        return f"{self.prefix}attempts"

    @property
    def audit(self) -> str:
        return f"{self.prefix}audit"

    @property
    def control_partition(self) -> Partition:
        return Partition(self.control, CONTROL_PARTITION)

    def kind_of(self, topic: str) -> str:
        """Return a topic's kind, as used in metrics. A source's topic may have any name."""
        kinds = {
            self.dead: "dead",
            self.parked: "parked",
            self.dedupe: "dedupe",
            self.control: "control",
            self.responses: "responses",
        }
        return kinds.get(topic, "retry" if topic.startswith(self.retry("")) else "events")

    def group(self, name: str) -> str:
        return f"{self.prefix}{name}"

    def ordered(self, route: str, destination: str) -> str:
        """Return the topic of an ordered route and one of its destinations; names contain no capital letters."""
        return f"{self.prefix}ordered.{route}{_TO}{destination}"

    def ordered_group(self, route: str, destination: str) -> str:
        """Return the group that reads that topic; names contain no slashes."""
        return f"{self.prefix}ordered/{route}/{destination}"

    def ordered_target(self, topic: str) -> tuple[str, str] | None:
        """Return the route and destination of an ordered topic; None for any other topic."""
        route, _, destination = topic.removeprefix(f"{self.prefix}ordered.").partition(_TO)
        return (route, destination) if topic == self.ordered(route, destination) and route and destination else None

    def specs(
        self,
        event_topics: Iterable[str],
        ordered: Iterable[tuple[str, str]] = (),
        *,
        has_responses: bool = False,
        has_quarantine: bool = False,
    ) -> tuple[TopicSpec, ...]:
        """Return all topics' specifications, the event topics first; `ordered` are ordered routes and destinations.

        `has_responses` is whether senders may wait for responses of destinations, `has_quarantine` whether refused
        requests are kept. Raises RulesError if a source uses one of the gateway's own topics.
        """
        names = sorted(set(event_topics))
        events = [TopicSpec(name=name, partitions=6, retention=7 * DAY) for name in names]
        tiers = [
            TopicSpec(name=self.retry(tier), partitions=4, retention=delay + 7 * DAY, until_done=True)
            for tier, delay in TIERS.items()
        ]
        own = (
            *[
                TopicSpec(
                    name=self.ordered(*target),
                    partitions=ORDERED_PARTITIONS,
                    retention=7 * DAY,
                    fixed_keys=True,
                    until_done=True,
                )
                for target in sorted(set(ordered))
            ],
            *tiers,
            TopicSpec(name=self.dead, partitions=4, retention=30 * DAY),
            TopicSpec(name=self.parked, partitions=4, retention=30 * DAY),
            TopicSpec(name=self.attempts, partitions=4, retention=7 * DAY, is_best_effort=True),
            # The longest window, plus a day during which an event may wait to be read.
            TopicSpec(name=self.dedupe, partitions=6, retention=8 * DAY),
            TopicSpec(name=self.control, partitions=1, retention=None, compacted=True, total_order=True),
            TopicSpec(name=self.audit, partitions=1, retention=AUDIT_RETENTION, is_best_effort=True),
        )
        if has_responses:  # nobody waits for one longer than 30 seconds
            own = (*own, TopicSpec(name=self.responses, partitions=2, retention=3600.0))
        if has_quarantine:  # as long as events, which they may become
            own = (*own, TopicSpec(name=self.rejected, partitions=4, retention=7 * DAY))
        taken = {self.rejected, self.responses, *[spec.name for spec in own]}.intersection(names)
        taken |= {name for name in names if self.ordered_target(name)}
        if taken:
            raise RulesError(f"topic {min(taken)}: expected a name for events, got one of the gateway's own topics")
        return (*events, *own)
