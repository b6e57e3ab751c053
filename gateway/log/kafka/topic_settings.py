"""A topic's specification as Kafka settings: those to create it with, and which existing ones break a guarantee."""

import math
from collections.abc import Iterator, Mapping

from gateway.log.base import TopicSpec
from gateway.log.topics import DAY

BROKER_LIMIT = 1_048_588  # Kafka's default of max.message.bytes, which bounds a batch.
REPLICAS = 3
SEGMENTS = 6  # into which a retention of less than a day is divided


def settings_of(spec: TopicSpec, replicas: int) -> Mapping[str, str]:
    settings = {
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(BROKER_LIMIT),
        "cleanup.policy": "compact" if spec.compacted else "delete",
    }
    if not spec.compacted:
        settings["retention.ms"] = "-1" if spec.retention is None else str(int(1000 * spec.retention))
    if spec.retention is not None and spec.retention < DAY:
        # Kafka deletes whole segments, and by default one takes records for a week, or 1 GiB.
        settings["segment.ms"] = str(int(1000 * spec.retention / SEGMENTS))
    if replicas == REPLICAS:
        settings["min.insync.replicas"] = "2"
    return settings


def exact_partition_problems(spec: TopicSpec, partitions: int) -> Iterator[str]:
    """Yield problems that aren't tolerable even with `--dev`: control records would be ignored."""
    if spec.total_order and partitions != spec.partitions:
        advice = "records in other partitions are ignored: stop all processes, delete the topic, and create it again"
        yield f"partitions: expected exactly {spec.partitions}, got {partitions}; {advice}"


def partition_problems(spec: TopicSpec, partitions: int) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, problem)."""
    if spec.fixed_keys and partitions < spec.partitions:
        advice = "keys would move once some are added: add them while the topic is empty, or create it again"
        yield True, f"partitions: expected {spec.partitions}, got {partitions}; {advice}"
    if spec.fixed_keys and partitions > spec.partitions:
        yield (
            False,
            f"partitions: expected {spec.partitions}, got {partitions}; the others stay unused, since no key moves",
        )


def replication_problems(
    replicas: int, settings: Mapping[str, str], *, is_single_broker: bool
) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, problem)."""
    if replicas < REPLICAS:
        yield not is_single_broker, f"replication factor: expected at least {REPLICAS}, got {replicas}"
    in_sync = int(settings.get("min.insync.replicas", "2"))
    if in_sync < min(2, replicas):
        yield not is_single_broker, f"min.insync.replicas: expected at least 2, got {in_sync}"
    if in_sync > replicas and "min.insync.replicas" in settings:
        yield True, f"min.insync.replicas: expected at most the replication factor {replicas}, got {in_sync}"
    if settings.get("unclean.leader.election.enable") == "true":
        yield False, "unclean.leader.election.enable: expected false, got true, which may lose acknowledged records"


def retention_problems(spec: TopicSpec, settings: Mapping[str, str]) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, problem)."""
    policies = settings.get("cleanup.policy", "delete").split(",")
    if ("compact" in policies) != spec.compacted:
        # Compaction would delete events that share a key; without it, pauses would be deleted.
        yield True, f"cleanup.policy: expected {'compact' if spec.compacted else 'delete'}, got {','.join(policies)}"
    if "delete" not in policies:
        return
    kept = int(settings.get("retention.ms", "-1"))
    if kept >= 0 and (spec.retention is None or kept < 1000 * spec.retention):
        wanted = "-1 (no limit)" if spec.retention is None else f"at least {1000 * spec.retention:.0f}"
        yield True, f"retention.ms: expected {wanted}, got {kept}"
    if (size := int(settings.get("retention.bytes", "-1"))) >= 0:
        yield False, f"retention.bytes: expected -1 (no limit), got {size}, which may delete what isn't delivered yet"


def retention_of(settings: Mapping[str, str]) -> float:
    """Return the seconds for which a topic with these settings keeps its records; infinity if forever."""
    kept = int(settings.get("retention.ms", "-1"))
    is_deleted = "delete" in settings.get("cleanup.policy", "delete").split(",")
    return kept / 1000 if is_deleted and kept >= 0 else math.inf


def record_problems(settings: Mapping[str, str]) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, problem)."""
    if (kind := settings.get("message.timestamp.type")) != "LogAppendTime":
        yield True, f"message.timestamp.type: expected LogAppendTime, got {kind}"
    if (limit := int(settings.get("max.message.bytes", BROKER_LIMIT))) < BROKER_LIMIT:
        yield True, f"max.message.bytes: expected at least {BROKER_LIMIT}, got {limit}"
