"""Reads the topic of an ordered route and destination: which of its records are new, and which were appended twice."""

from abc import abstractmethod
from collections.abc import Collection, Sequence

from typing_extensions import override

from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.group_member import GroupMember
from gateway.engine.ordered.duplicate_appends import DuplicateAppends
from gateway.engine.partition_tracker import PendingRecord, Tracker
from gateway.engine.services import Services
from gateway.log.base import COMMIT_BYTES, Assignment, Batch, Commit, Partition, Record
from gateway.log.records import Origin, StoredDelivery, decoded_delivery, origin_of
from gateway.model import NewerRecordError, UndecodableRecordError


class OrderedReader(GroupMember):
    """A member of the group of an ordered route and destination, without what it does with the deliveries."""

    keeps_order = True

    def __init__(self, services: Services, dispatcher: Dispatcher, target: tuple[str, str], *, memory: int) -> None:
        super().__init__(services, dispatcher, None, services.topics.ordered_group(*target), memory=memory)
        self.route, self.destination = target
        self.topic = services.topics.ordered(*target)
        self._appended: dict[Tracker, DuplicateAppends] = {}

    @abstractmethod
    def _enqueue(self, record: PendingRecord, stored: StoredDelivery, origin: Origin | None) -> None:
        """Take the delivery of a new record over; it has an `origin` if a router has matched it."""

    @override
    async def wanted(self) -> frozenset[str]:
        return frozenset((self.topic,))

    # Partitions.

    @override
    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        super().assigned(assignments, without_position)
        for assignment in assignments:
            self._appended[self.trackers[assignment.partition]] = DuplicateAppends(assignment.commit.metadata)

    @override
    def _abandon(self, tracker: Tracker) -> None:
        super()._abandon(tracker)
        self._appended.pop(tracker, None)

    @override
    def commit_metadata(self, tracker: Tracker, commit: Commit) -> bytes:
        appended = self._appended[tracker]
        before = appended.omitted
        metadata = appended.metadata(commit.base, COMMIT_BYTES - len(commit.done))
        if appended.omitted and not before:
            self._services.logger.warning(
                "ordered_commit_metadata_full",
                topic=self.topic,
                partition=tracker.partition.number,
                count=appended.omitted,
            )
        return metadata

    # Reading.

    @override
    async def on_batch(self, tracker: Tracker, batch: Batch) -> None:
        for index, record in enumerate(batch.records):
            if not tracker.is_live or self._is_draining or self._is_stopped_by_newer_record(tracker):
                break
            if not self.has_room_for(tracker):
                self.postpone(tracker, batch.records[index:])
                break
            self._accept_record(tracker, record)
        if self._is_stopped_by_newer_record(tracker) or not tracker.progress.has_room():
            self.pause(tracker)

    def _accept_record(self, tracker: Tracker, record: Record) -> None:
        content = decoded_delivery(record)
        # The position in a foreign record says nothing about what a router has appended.
        origin = None if isinstance(content, UndecodableRecordError) else origin_of(record)
        # Checked for completed records, too: their positions must go into the metadata of later commits, for the
        # next owner.
        is_duplicate = origin is not None and self._appended[tracker].is_duplicate(record.offset, origin)
        pending_record = self.track(tracker, record, self._log.now())
        if pending_record is None:
            return
        if is_duplicate:
            self.done(pending_record)
        elif isinstance(content, UndecodableRecordError):
            self._dispatcher.dead_letter_undecodable(pending_record, record, content)
        elif isinstance(content, NewerRecordError):
            self.leave_to_newer_version(pending_record, content)
        elif origin is None and tracker.is_duplicate_record(content.delivery, record.offset):
            self.done(pending_record)
        else:
            self._enqueue(pending_record, content, origin)
