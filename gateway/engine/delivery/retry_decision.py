"""What follows from an attempt's result: delivered, retried at a time, dead-lettered or dropped.

attempt ─▶ classify ─┬─ None ─────────▶ Delivered
                     ├─ DROP ─────────▶ Dropped
                     ├─ DEAD_LETTER ──▶ DeadLettered(gone | permanent)
                     ├─ RETRY_SHORT ──▶ within the short budget? ─ no ─▶ DeadLettered(permanent)
                     │                          │ yes
                     └─ RETRY ────────▶ attempts left? ─ no ─▶ DeadLettered(exhausted)
                                                │ yes
                                        due before max_age? ─ no ─▶ DeadLettered(expired)
                                                │ yes
                                              Retry
"""

import hashlib
from dataclasses import dataclass
from itertools import takewhile
from typing import assert_never

from gateway.client.retry_after import RETRY_AFTER_CAP
from gateway.model import (
    Attempt,
    DeadLettered,
    DeadReason,
    Delivered,
    Delivery,
    DeliveryId,
    Disposition,
    Dropped,
    Result,
)
from gateway.rules.retry_policy import RetryPolicy

# A refusal is retried for as long as a bad deployment takes to be rolled back. Five attempts of the default schedule
# (0 s, 5 s, 35 s, 2.6 min, 12.6 min) fit into it.
SHORT_ATTEMPTS = 5
SHORT_AGE = 15 * 60.0


_TABLE = {
    "3xx": Disposition.RETRY_SHORT,
    "408": Disposition.RETRY,
    "410": Disposition.DEAD_LETTER,
    "425": Disposition.RETRY,
    "429": Disposition.RETRY,
    "4xx": Disposition.RETRY_SHORT,
    "5xx": Disposition.RETRY,
    "timeout": Disposition.RETRY,
    "connect": Disposition.RETRY,
    "dns": Disposition.RETRY,
    "tls": Disposition.RETRY,
    "transport": Disposition.RETRY,
    "auth": Disposition.RETRY,  # The destination has said nothing against the delivery.
    "egress_refused": Disposition.RETRY_SHORT,  # A DNS record can heal.
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The delivery is retried, not before `due` (Unix seconds)."""

    due: float


Verdict = Delivered | Retry | DeadLettered | Dropped


def decide(delivery: Delivery, attempt: Attempt, policy: RetryPolicy, *, now: float) -> Verdict:
    """Decide what follows from the attempt just made, whether or not `delivery.attempts` has it already.

    The delay counts from `now`. It is the schedule's, with the jitter, or what a 429 or 503 asks for if that is longer.
    """
    match disposition := classify(attempt, policy):
        case None:
            return Delivered()
        case Disposition.DROP:
            return Dropped(detail=_detail(attempt))
        case Disposition.DEAD_LETTER:
            reason = DeadReason.GONE if _names(attempt)[0] == "410" else DeadReason.PERMANENT
            return DeadLettered(reason=reason, detail=_detail(attempt))
        case Disposition.RETRY | Disposition.RETRY_SHORT:
            is_short = disposition is Disposition.RETRY_SHORT
            return _retry(delivery, attempt, policy, is_short=is_short, now=now)
        case _:
            assert_never(disposition)


def classify(attempt: Attempt, policy: RetryPolicy) -> Disposition | None:
    """Look a result up: by its status, then its class, then its kind of failure. None is a success.

    The policy's entries replace those of the default table: a `4xx` of its own leaves the default for 429 alone.
    A 2xx is a success, whatever the policy says.
    """
    if attempt.result is Result.SUCCESS:
        return None
    overrides = dict(policy.results)
    return next(table[name] for name in _names(attempt) for table in (overrides, _TABLE) if name in table)


def jitter_of(delivery_id: DeliveryId, attempt_number: int) -> float:
    """Return a number in [-1, 1) that is the same in every process, so that duplicates of a delivery stay together."""
    digest = hashlib.blake2b(f"{delivery_id}\0{attempt_number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**52 - 1  # 53 bits, all that a float holds: 1.0 is never reached.


def _retry(
    delivery: Delivery, attempt: Attempt, policy: RetryPolicy, *, is_short: bool, now: float
) -> Retry | DeadLettered:
    due = now + _delay(delivery.id, attempt, policy)
    if attempt.number >= policy.max_attempts:
        reason = DeadReason.EXHAUSTED
    elif is_short and not _is_in_short_budget(delivery, attempt, policy, due=due):
        reason = DeadReason.PERMANENT
    elif due > delivery.age_began_at + policy.max_age:
        reason = DeadReason.EXPIRED
    else:
        return Retry(due=due)
    return DeadLettered(reason=reason, detail=_detail(attempt))


def _delay(delivery_id: DeliveryId, attempt: Attempt, policy: RetryPolicy) -> float:
    step = policy.schedule[min(attempt.number, len(policy.schedule)) - 1]
    delay = step * (1 + policy.jitter * jitter_of(delivery_id, attempt.number))
    return delay if attempt.retry_after is None else max(delay, min(attempt.retry_after, RETRY_AFTER_CAP))


def _is_in_short_budget(delivery: Delivery, attempt: Attempt, policy: RetryPolicy, *, due: float) -> bool:
    """Return whether a refusal may be retried: the budget starts with the first of consecutive refusals.

    So neither an outage nor a pause before the first refusal uses it up.
    """
    before = [earlier for earlier in reversed(delivery.attempts) if earlier.number < attempt.number]
    refusals = [
        attempt,
        *takewhile(lambda earlier: classify(earlier, policy) is Disposition.RETRY_SHORT, before),
    ]
    return len(refusals) < SHORT_ATTEMPTS and due <= refusals[-1].at + SHORT_AGE


def _names(attempt: Attempt) -> tuple[str, ...]:
    """Return what a table may call the attempt's result, the most specific first.

    A status counts only where the answer is the result: a body that times out after a 200 is a timeout.
    """
    match attempt.result:
        case Result.THROTTLED:
            return ("429", "4xx")
        case Result.UNAUTHORIZED:
            return (str(attempt.status), "4xx")
        case Result.SUCCESS | Result.REDIRECT | Result.CLIENT_ERROR | Result.SERVER_ERROR:
            return (str(attempt.status), attempt.result.value)
        case (
            Result.TIMEOUT
            | Result.CONNECT
            | Result.DNS
            | Result.TLS
            | Result.TRANSPORT
            | Result.AUTH
            | Result.EGRESS_REFUSED
        ):
            return (attempt.result.value,)
        case _:
            assert_never(attempt.result)


def _detail(attempt: Attempt) -> str:
    return f"{_names(attempt)[0]} after {attempt.number} attempt{'' if attempt.number == 1 else 's'}"
