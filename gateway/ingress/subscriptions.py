"""Confirms subscriptions: requests the address by which a verified message of Amazon SNS asks for that, once.

    SubscriptionConfirmation ─▶ confirmed? ──yes──▶ 200
                                    │ no
                                being visited, or none left of its share? ──yes──▶ 503
                                    │ no
                                  visit ──▶ 200, or 503: SNS sends it again, some times

Such a message is verified, but it may be any age: whoever has seen one can repeat it, and whoever may subscribe to the
topic can have SNS send as many as they like. So visits are limited, with a share for each message (`quota.py`): up to
ten that somebody repeats take none of the one that comes for the first time. A confirmed one needs no second visit: its
token is of that subscription alone, and a new subscription has a new one
(https://docs.aws.amazon.com/sns/latest/api/API_ConfirmSubscription.html).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection
from hashlib import sha256

from structlog.typing import FilteringBoundLogger

from gateway.ingress.fetch_turns import FetchTurns
from gateway.model import RefusedError, UnfetchedError
from gateway.quarantine.quota import FairBucket
from gateway.verify.remote_keys import MAX_DOCUMENT_BYTES, key_unavailable
from gateway.verify.request import Reason

VISIT_TIMEOUT = 3.0
AT_ONCE, PER_SECOND = 20.0, 10 / 60
"""Visits of a source, of which one message has half of what the others leave. A topic is subscribed once."""
MAX_CONFIRMED = 256
"""Confirmed messages of a source that are known as such: the last ones that came."""


class Subscriptions:
    """The subscriptions that each source's senders ask to have confirmed. Without `fetches` none can be.

    `may_log` returns whether there may be another line that a source's subscription isn't confirmed.
    """

    def __init__(
        self, fetches: FetchTurns | None, *, logger: FilteringBoundLogger, may_log: Callable[[str], bool]
    ) -> None:
        self._fetches = fetches
        self._logger = logger
        self._may_log = may_log
        self._sources: dict[str, _Subscriptions] = {}

    def retain(self, sources: Collection[str]) -> None:
        """Forget all other sources. A reload gives those that stay no new visits."""
        self._sources = {name: each for name, each in self._sources.items() if name in sources}

    async def confirm(self, source: str, url: str) -> None:
        """Request the address by which a verified sender asks for a confirmation. Raises RefusedError: 503."""
        if self._fetches is None:
            raise key_unavailable("nothing is fetched here")
        now = asyncio.get_running_loop().time()
        own = self._sources.get(source)
        if own is None:
            own = self._sources[source] = _Subscriptions(now)
        digest = sha256(url.encode()).digest()  # the address has a token in it, and is long
        if own.is_confirmed(digest):
            return
        if digest in own.visiting:
            raise _unconfirmed()
        if not own.begin(digest, now):
            self._warn(source, "too many confirmations")
            raise _unconfirmed()
        try:
            async with asyncio.timeout(2 * VISIT_TIMEOUT):  # with the wait for its turn
                await self._fetches.fetch(source, url, timeout=VISIT_TIMEOUT, limit=MAX_DOCUMENT_BYTES)
            own.keep(digest)
        except (UnfetchedError, TimeoutError) as error:
            self._warn(source, str(error) or "expected a turn among the fetches in time, got none")
            raise _unconfirmed() from error
        finally:
            own.visiting.discard(digest)
        self._logger.info("subscription_confirmed", source=source)

    def _warn(self, source: str, reason: str) -> None:
        if self._may_log(source):
            self._logger.warning("subscription_not_confirmed", source=source, reason=reason)


class _Subscriptions:
    """Those of one source, by digests of their addresses."""

    __slots__ = ("_confirmed", "_visits", "visiting")

    def __init__(self, now: float) -> None:
        self._confirmed: OrderedDict[bytes, None] = OrderedDict()
        self._visits = FairBucket(capacity=AT_ONCE, rate=PER_SECOND, now=now)
        self.visiting: set[bytes] = set()

    def is_confirmed(self, digest: bytes) -> bool:
        if digest not in self._confirmed:
            return False
        self._confirmed.move_to_end(digest)
        return True

    def begin(self, digest: bytes, now: float) -> bool:
        """Return whether an address may be visited now; if so, its visit has begun."""
        if not self._visits.has(digest, 1, now=now):
            return False
        self._visits.take(digest, 1)
        self.visiting.add(digest)
        return True

    def keep(self, digest: bytes) -> None:
        self._confirmed[digest] = None
        if len(self._confirmed) > MAX_CONFIRMED:
            self._confirmed.popitem(last=False)


def _unconfirmed() -> RefusedError:
    return RefusedError(503, Reason.UNCONFIRMED_SUBSCRIPTION.value, "the subscription can't be confirmed at the moment")
