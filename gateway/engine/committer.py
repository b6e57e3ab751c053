"""When a member of a group commits which records are done.

    done ──▶ counted ──64, or one that others wait for──▶ committed within moments
                └───────────otherwise──────────────────▶ committed within a second

One commit of a member is in flight at a time; what completes meanwhile is part of the next. None is sent before the
dedupe entries that it covers are stored.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping

from gateway.engine.dedupe.filter import PartitionDedupe
from gateway.engine.partition_tracker import Tracker
from gateway.engine.services import Services
from gateway.log.base import Commit, Consumer, Partition
from gateway.model import ForbiddenError, LogUnavailableError
from gateway.telemetry.log_throttle import LogThrottle

COMMIT_EVERY = 1.0
"""Maximum seconds until completed records are committed, however few there are."""
COMMIT_AFTER = 64
"""Completed records that are committed at once: a crash repeats what isn't committed."""
COMMIT_GAP = 0.02
"""Minimum seconds between commits: on Kafka each takes a third of a millisecond of CPU time."""


class Committer:
    """Commits the partitions of one member, `trackers` and those `leaving`. Run both of its loops until cancelled."""

    def __init__(
        self,
        services: Services,
        group: str,
        *,
        trackers: Mapping[Partition, Tracker],
        leaving: Collection[Tracker],
        dedupe_handles: Mapping[Tracker, PartitionDedupe],
        consumer: Callable[[], Consumer | None],
        metadata: Callable[[Tracker, Commit], bytes],
    ) -> None:
        self._services = services
        self._group = group
        self._trackers = trackers
        self._leaving = leaving
        self._dedupe_handles = dedupe_handles
        self._consumer = consumer
        self._metadata = metadata
        self._done_count = 0  # records, since the last commit
        self._is_due = asyncio.Event()
        self._lock = asyncio.Lock()
        self._is_ending = False
        self._flush_failures = LogThrottle()

    def count_done(self, *, is_waited_for: bool) -> None:
        """Count a record that is done; the commit of one that ordered deliveries wait for is due at once."""
        self._done_count += 1
        if self._done_count >= COMMIT_AFTER or is_waited_for:
            self._is_due.set()

    def hasten(self) -> None:
        """Commit within moments what is done."""
        self._is_due.set()

    async def keep_committing(self) -> None:
        """Commit what is done once a second."""
        while True:
            await self._services.sleep(COMMIT_EVERY)
            await self.commit()

    async def keep_committing_when_due(self) -> None:
        """Commit as soon as COMMIT_AFTER records are done, or one that ordered deliveries wait for."""
        while True:
            await self._is_due.wait()
            is_accepted = await self.commit()
            await self._services.sleep(COMMIT_EVERY if is_accepted is False else COMMIT_GAP)

    async def commit(
        self, partitions: Iterable[Partition] | None = None, *, is_ownership_check: bool = False
    ) -> bool | None:
        """Commit these partitions if something is new; with `is_ownership_check`, in any case.

        By default it is all of them, and those that are being revoked: what ends there may wait for a commit.

        Return whether the commit was accepted, which proves that we are still in the group; None if there was none to
        send.
        """
        async with self._lock:
            if self._is_ending:
                return None  # what was done is in the last commits
            self._done_count = 0
            self._is_due.clear()
            trackers = (
                [*self._trackers.values(), *self._leaving]
                if partitions is None
                else [self._trackers[partition] for partition in partitions if partition in self._trackers]
            )
            wanted = self._new_commits(trackers, is_ownership_check=is_ownership_check)
            covered = await self._covered(wanted)
            # A partition whose revocation is over meanwhile isn't included: its member has committed it.
            commits = {tracker: commit for tracker, commit in covered.items() if tracker.is_writable}
            consumer = self._consumer()
            if not commits or consumer is None:
                return False if len(covered) < len(wanted) else None
            return await self._store(consumer, commits)

    async def _store(self, consumer: Consumer, commits: Mapping[Tracker, Commit]) -> bool:
        """Commit; where a topic is forbidden, each topic by itself. Return whether all of it was accepted."""
        try:
            await consumer.commit({tracker.partition: commit for tracker, commit in commits.items()})
        except LogUnavailableError as error:
            topics = {tracker.partition.topic for tracker in commits}
            if isinstance(error, ForbiddenError) and len(topics) > 1:
                each = [{one: commits[one] for one in commits if one.partition.topic == topic} for topic in topics]
                return all([await self._store(consumer, those) for those in each])
            self._services.logger.warning("commit_retried", group=self._group, error=str(error))
            return False
        for tracker, commit in commits.items():
            tracker.committed(commit)
        return True

    async def last_commits(self, trackers: Iterable[Tracker]) -> dict[Tracker, Commit]:
        """Return the new commits of partitions that are being revoked, once the entries that they cover are stored.

        As soon as it returns they have to be suspended: a later commit would go first, and these would then take it
        back. None begins meanwhile. One that is in flight isn't waited for: it is older, and its consumer sends it
        first.
        """
        self._is_ending = True
        try:
            return await self._covered(self._new_commits(trackers))
        finally:
            self._is_ending = False

    def _new_commits(self, trackers: Iterable[Tracker], *, is_ownership_check: bool = False) -> dict[Tracker, Commit]:
        return {
            tracker: commit._replace(metadata=self._metadata(tracker, commit))
            for tracker in trackers
            if (commit := tracker.progress.committable(is_known=is_ownership_check)) is not None
        }

    async def _covered(self, wanted: Mapping[Tracker, Commit]) -> dict[Tracker, Commit]:
        """Store the dedupe entries that these commits cover; return the commits of which that succeeds."""
        commits = dict(wanted)
        unflushed = {
            tracker: handle
            for tracker in commits
            if (handle := self._dedupe_handles.get(tracker)) is not None and not handle.is_flushed
        }
        flushes = [handle.flush() for handle in unflushed.values()]
        for tracker, failed in zip(unflushed, await asyncio.gather(*flushes, return_exceptions=True), strict=True):
            if isinstance(failed, LogUnavailableError):
                if self._flush_failures.count(self._group, self._services.log.now()):
                    self._services.logger.warning("commit_retried", group=self._group, error=str(failed))
                del commits[tracker]
            elif failed is not None:
                raise failed
        return commits
