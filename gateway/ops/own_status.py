"""What a process returns at `/status` of what it has in memory; `process_status.py` reads it.

The names are an interface: commands of another version read them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.engine.delivery.holds import Hold
from gateway.engine.ordered.blocked_keys import Blocked, RouteState
from gateway.engine.unavailable_partitions import Unread
from gateway.log.base import Partition
from gateway.model import result_label
from gateway.ops.findings import REFUSALS


def unread_statuses(unread: Mapping[Partition, Unread]) -> Sequence[Mapping[str, Any]]:
    """Return which partitions can't be read, since when and why."""
    return [
        {"topic": partition.topic, "partition": partition.number, "since": since, "reason": reason}
        for partition, (since, reason) in sorted(unread.items())
    ]


def hold_statuses(holds: Mapping[str, Hold]) -> Sequence[Mapping[str, Any]]:
    """Return why nothing is sent to destinations, and until when."""
    return [
        {
            "destination": name,
            "why": hold.reason,
            "after": hold.last_failure,
            "since": hold.since,
            "until": None if hold.is_probe_due else hold.until,
            "untried_since": hold.untried_since,
        }
        for name, hold in sorted(holds.items())
    ]


def ordered_statuses(states: Mapping[tuple[str, str], RouteState]) -> Sequence[Mapping[str, Any]]:
    """Return the status of ordered routes, by route and destination."""
    return [
        {"route": route, "destination": destination, **route_status(state)}
        for (route, destination), state in sorted(states.items())
    ]


MAX_FAILURES = 3
"""How many failures of an ordered route's keys a status names."""


def route_status(state: RouteState) -> Mapping[str, Any]:
    """Return the status of an ordered route: of its keys, and whether the rules have it.

    The names are an interface: commands of another version read them.
    """
    return {
        **keys_status(state.blocked),
        "partitions": state.partitions,
        "unknown_since": state.unknown_since,
        "quiet": state.quiet_keys,
        "quiet_until": state.quiet_until,
    }


def keys_status(keys: Sequence[Blocked]) -> Mapping[str, Any]:
    """Return how many keys of an ordered route are halted, or wait for a retry, and the longest of each."""
    halted = [key for key in keys if key.halted is not None]
    blocked = [key for key in keys if key.halted is None]
    return {
        "halted": len(halted),
        "blocked": len(blocked),
        "longest_halted": _longest(halted),
        "longest_blocked": _longest(blocked),
        "failures_halted": _failures(halted),
        "failures_blocked": _failures(blocked),
    }


def _failures(keys: Sequence[Blocked]) -> Sequence[tuple[str, str, int]]:
    """Return the most frequent failures of keys: the reason why they are halted, the last result, and how many keys."""
    failures = Counter([("" if key.halted is None else str(key.halted.reason), _last_result(key)) for key in keys])
    return [(reason, after, number) for (reason, after), number in failures.most_common(MAX_FAILURES)]


def _longest(keys: Sequence[Blocked]) -> Mapping[str, Any] | None:
    if not keys:
        return None
    key = min(keys, key=lambda each: each.since)
    return {
        "since": key.since,
        "until": key.delivery.due or None if key.halted is None else None,
        "event_id": key.delivery.event.id,
        "reason": "" if key.halted is None else key.halted.reason,
        "detail": "" if key.halted is None else key.halted.detail,
        "after": _last_result(key),
        "refused": any(_last_result(each) in REFUSALS for each in keys),
    }


def _last_result(key: Blocked) -> str:
    attempts = key.delivery.attempts
    return result_label(attempts[-1]) if attempts else ""
