"""What a record of the dead-letter topic says: what orders look at, and what it holds."""

from gateway.engine.control.records import Letter
from gateway.log.base import Record
from gateway.log.records import StoredDelivery, decode_delivery, is_newer
from gateway.model import DeadReason, UndecodableRecordError

NEWER = "newer"
"""The reason of a dead letter that a newer version wrote, as far as this one can tell."""


def read_letter(record: Record) -> tuple[Letter, StoredDelivery | None]:
    """Read a record of the dead-letter topic: what filters look at, and what it holds if that can be read."""
    reason = NEWER if is_newer(record) else DeadReason.UNDECODABLE
    stored = None if reason == NEWER else filed_in(record)
    if stored is None:
        return Letter(id="", route="", destination="", reason=reason, at=record.appended_at), None
    delivery = stored.delivery
    letter = Letter(
        id=delivery.id,
        route=delivery.route,
        destination=delivery.destination,
        reason=stored.note.reason,
        at=record.appended_at,
    )
    return letter, stored


def filed_in(record: Record) -> StoredDelivery | None:
    """Return the delivery of a record, None where it can't be read. Raises NewerRecordError."""
    try:
        return decode_delivery(record)
    except UndecodableRecordError:
        return None
