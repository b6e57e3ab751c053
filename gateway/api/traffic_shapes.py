"""What the API answers about traffic: how much of what there was in some time, and in each step of it."""

from dataclasses import dataclass

from gateway.api.json_shapes import Time


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of something had this reason, or this result."""

    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryTraffic:
    """Deliveries of which the log has something: `begun`, and what they are by now.

    Where only failures are recorded, those that succeeded at once aren't among them. `done` have ended, and it isn't
    recorded how: by a success after a failure, or superseded. `waiting` are paused, wait for a retry or their turn.
    `unknown` are those whose end the log, or the index, didn't keep. `died` became dead letters, by `reasons`: of
    these, `dead` are open. `replayed` ones begin again, as others, and are counted where that was.
    """

    begun: int
    delivered: int
    done: int
    dropped: int
    waiting: int
    unknown: int
    died: int
    dead: int
    reasons: tuple[Share, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptTraffic:
    """Attempts that are recorded: `made`, of which `failed` and `retries` (no delivery's first), and their results.

    `p50_seconds` and `p95_seconds` are about how long they took, null if there were none.
    """

    made: int
    failed: int
    retries: int
    results: tuple[Share, ...]
    p50_seconds: float | None
    p95_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficStep:
    """What there was from `at` on, until the next step."""

    at: Time
    received: int | None
    deliveries: int
    delivered: int
    died: int
    attempts: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What there was from `since` to `until`, to which the index is complete, and in steps, the oldest first.

    Events count where they were received, `bytes` being those of their bodies; deliveries there too, or where they
    were replayed, however late they end; attempts where they began. Of routes and destinations, events are null.
    `duplicates` are the events that were found to be some: they are delivered nowhere.
    `attempts_recorded` is "failures" if in that time no success of anything is recorded: then attempts are failures
    alone, and deliveries those that had some; else "all", as far as each process records them.
    """

    since: Time
    until: Time
    step_seconds: int
    attempts_recorded: str
    received: int | None
    bytes: int | None
    duplicates: int | None
    deliveries: DeliveryTraffic
    attempts: AttemptTraffic
    steps: tuple[TrafficStep, ...]
