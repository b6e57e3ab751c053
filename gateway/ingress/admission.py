"""How many requests of one source are admitted: tokens of its `rate`, and places of its `concurrent`. Pure.

    head ──▶ would it be refused? ──▶ body ──▶ verified ──▶ enter: a token and a place ──▶ response ──▶ leave

Only a verified request takes a token or a place, when it enters. If requests took them before, whoever reaches the path
could take all: a flood with forged signatures would use the rate up, and some connections that stall would hold the
places, and the real sender would get the refusals. It also follows that `concurrent` doesn't count requests whose
body is still arriving: who they are from isn't known. Their memory and time are bounded elsewhere (`body_memory.py`),
where a verified request evicts them. Evicting them here as well would be no better: the newest of a flood would evict
the real sender's, whose body takes a moment to arrive.

A body isn't read while its request would be refused in any case (`refusal`); that takes nothing. Then the tokens and
places are all taken by verified requests, so an unverified one can't cause it either. Several requests that were let
through to their bodies may find fewer tokens than they are when they enter: those are refused then.

The rate is this process's share of a source's (`rate_share.py`); `concurrent` is each process's own.
"""

import math

from gateway.model import RefusedError

BURST = 1.0
"""Seconds worth of a rate that may come at once; at least one request."""
ROUNDING_ERROR = 1e-6
"""What a token may lack, as times are inexact: a request that comes after its `Retry-After` isn't refused again."""


class Admission:
    """The tokens and places of one source. Times are seconds of a monotonic clock."""

    __slots__ = ("_burst", "_concurrent", "_rate", "_tokens", "_tokens_at", "in_progress")

    def __init__(self) -> None:
        self.in_progress = 0
        """Verified requests that have no response yet."""
        self._concurrent: int | None = None
        self._rate: float | None = None
        self._burst = 0.0
        self._tokens = 0.0
        self._tokens_at = 0.0

    def set_limits(self, *, rate: float | None, concurrent: int | None, now: float) -> None:
        """Set the limits, without giving back what is taken: a reload is no reason for another burst."""
        self._concurrent = concurrent
        if rate == self._rate:
            return
        self._refill(now)
        burst = 0.0 if rate is None else max(1.0, rate * BURST)
        self._tokens = burst if self._rate is None else min(self._tokens, burst)
        self._rate, self._burst = rate, burst

    def refusal(self, now: float) -> RefusedError | None:
        """Return how a request would be refused if it entered now; None if it wouldn't be."""
        if self._concurrent is not None and self.in_progress >= self._concurrent:
            return RefusedError(
                503, "concurrency_limited", f"expected at most {self._concurrent} requests in progress at a time"
            )
        if self._rate is not None:
            self._refill(now)
            if self._tokens < 1 - ROUNDING_ERROR:
                # In whole seconds (RFC 9110, section 10.2.3): the first one at whose end there is a token.
                seconds = max(1, math.ceil((1 - ROUNDING_ERROR / 2 - self._tokens) / self._rate))
                return RefusedError(429, "rate_limited", "expected requests at a lower rate", retry_after=seconds)
        return None

    def enter(self, now: float) -> None:
        """Take a token and a place for a verified request; `leave` must follow. Raises RefusedError, taking nothing."""
        if (refusal := self.refusal(now)) is not None:
            raise refusal
        if self._rate is not None:
            self._tokens = max(0.0, self._tokens - 1)
        self.in_progress += 1

    def leave(self) -> None:
        """Give the place of a request back, which has its response. Its token is used."""
        self.in_progress -= 1

    def _refill(self, now: float) -> None:
        if self._rate is not None:
            self._tokens = min(self._burst, self._tokens + max(0.0, now - self._tokens_at) * self._rate)
        self._tokens_at = max(self._tokens_at, now)
