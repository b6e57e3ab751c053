"""How far a replay has come, in memory; `replay` publishes it as a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.jobs.injector import APPENDS_AT_ONCE
from gateway.engine.jobs.log_reader import BATCH_BYTES, CHECKPOINT_EVERY
from gateway.engine.jobs.replay_matcher import Matched, Matcher
from gateway.engine.jobs.shared_identities import Identities
from gateway.engine.jobs.undelivered import OpenDeadLetters

RATE_STEP = 0.02
"""How much of the rate, in seconds, is injected at once (at least one delivery); also the maximum lag that is made up
for. So within any second it is at most 4 % more than the rate, or two deliveries."""


@dataclass(slots=True, kw_only=True)
class ReplayProgress:
    """A running replay. All below `positions` is injected; `reached` includes what the current batch covers.

    `last_checkpoint` and `checkpoint_count` are the positions and the count of the last checkpoint, `resolved` the dead
    letters whose deliveries were injected since, and `resolved_count` the number of these deliveries. `unreadable` are
    the partitions of events that it skips for now, `checkpoint_unreadable` is their number in the last checkpoint,
    `missed` are those of dead letters and dedupe entries that it couldn't read. `route_revision` is the route as in a
    routing revision, and `identities_by` how its sources identify events, "" once that has changed; `known_below` is up
    to which offset the control topic had been read when it began, by how often that had been recreated (`recreations`).
    `identities` are those of the current partition, once they matter. `next_at` is in the loop's time: the log's steps
    a little when its estimate of the brokers' clock is corrected, which would distort a rate.
    """

    command: ControlRecord
    selection: Selection
    owner: object
    matcher: Matcher
    open_dead: OpenDeadLetters
    positions: dict[str, int]
    count: int
    last_checkpoint: Mapping[str, int]
    checkpoint_count: int
    checkpoint_at: float
    unreadable: Mapping[str, str]
    checkpoint_unreadable: int
    missed: frozenset[str]
    known_below: int | None
    recreations: int
    route_revision: str | None = None
    identities_by: str | None = None
    next_at: float = 0.0
    since_backlog_check: int = CHECKPOINT_EVERY
    batch: list[Matched] = field(default_factory=list)
    batch_bytes: int = 0
    reached: dict[str, int] = field(default_factory=dict)
    resolved: list[str] = field(default_factory=list)
    resolved_count: int = 0
    identities: Identities | None = None

    def checkpoint(self, *, at: float, known_below: int | None) -> ControlRecord:
        """Return the checkpoint to publish. `known_below` is up to where the control topic is read now.

        It is None if that has been recreated since, or a newer version writes it: then nobody can tell what the replay
        knew.
        """
        knew: tuple[int, int] | None = None
        if self.selection.undelivered and self.known_below is not None and known_below is not None:
            knew = self.known_below, known_below
        return ControlRecord(
            kind="checkpoint",
            name=self.command.key,
            state="done",
            at=at,
            checkpoint=dict(self.positions),
            count=self.count,
            routes=self.route_revision or "",
            known_below=knew,
            identities="" if knew is None or self.identities_by is None else self.identities_by,
            unread=len(self.unreadable),
            detail=", ".join(sorted(self.missed)),
        )

    @property
    def deliveries(self) -> int:
        return sum([len(matched.destinations) for matched in self.batch])

    @property
    def is_full(self) -> bool:
        limit = min(APPENDS_AT_ONCE, CHECKPOINT_EVERY - (self.count - self.checkpoint_count))
        if self.selection.rate is not None:
            limit = min(limit, max(1, int(self.selection.rate * RATE_STEP)))
        return self.deliveries >= limit or self.batch_bytes >= BATCH_BYTES


def reason_of(unreadable: Mapping[str, str]) -> str:
    """Return which partitions can't be read, and why."""
    first, reason = next(iter(unreadable.items()))
    others = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
    return f"{first}{others}: {reason}"
