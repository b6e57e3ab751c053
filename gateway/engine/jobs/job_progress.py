"""How far a running job has come, and what it does with a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.engine.control.records import ControlRecord, partition_key
from gateway.engine.jobs.kick_outcomes import KickOutcome
from gateway.log.base import Partition, Record
from gateway.model import NO_METADATA, Delivery, RecordMetadata


@dataclass(slots=True, kw_only=True)
class JobProgress:
    """A running job: its command, which others it covers, how far it has scanned, and what it has counted."""

    command: ControlRecord
    covers_commands_below: int
    """The offset of the control topic when it began: its end is that of all earlier commands of the key."""
    recreations: int
    """Those of the control topic when it began: in a newer topic `covers_commands_below` means nothing."""
    detail: str
    positions: dict[str, int]
    latest: dict[str, float]
    """When the last of the records before its positions was appended, by partition."""
    covered: Mapping[str, int]
    """How far earlier jobs of its key have scanned, in the partitions as they were at `covered_until`."""
    covered_until: Mapping[str, float]
    count: int
    batch_count: int = 0
    """Deliveries counted in the current batch."""
    last_checkpoint: Mapping[str, int]
    """Its last checkpoint."""
    previous_checkpoint: Mapping[str, int]
    """The one before it: either may be the one in force as far as this process knows."""
    last_heartbeat_at: float
    """When it was begun or announced, or published its last checkpoint: the heartbeats of a kick."""
    outcome: KickOutcome | None = None
    """The outcomes of the deliveries that it counted, if known."""
    rate: float | None = None

    def is_covered(self, partition: Partition, record: Record) -> bool:
        """Return whether an earlier job of its key has scanned a record."""
        partition_name = partition_key(partition)
        return (
            record.offset < self.covered.get(partition_name, 0)
            and record.appended_at <= self.covered_until[partition_name]
        )

    @property
    def latest_of_all(self) -> float:
        """When the last of all records before its positions was appended; 0.0 without any."""
        return max(self.latest.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Picked:
    """What to do with a record: a delivery to inject, and the runs that count it."""

    runs: Sequence[JobProgress] = ()
    delivery: Delivery | None = None
    metadata: RecordMetadata = NO_METADATA
    is_undecodable: bool = False
    """Whether it has to be dead-lettered, before a checkpoint passes it: nobody reads it again."""
    is_left: bool = False
    """Whether only a newer version can tell what to do with it, which ends the scan of its partition."""


class Predecessor(NamedTuple):
    """The record of a delivery to inject, also told from one of a topic of that name that was recreated."""

    partition: Partition
    offset: int
    appended_at: float


class BatchItem(NamedTuple):
    """A delivery to inject, with its record metadata."""

    predecessor: Predecessor
    delivery: Delivery
    metadata: RecordMetadata


NOTHING = Picked()
LEFT = Picked(is_left=True)
