"""Decode records of the dead-letter topic: the properties that filters check, and the delivery."""

from gateway.engine.control.records import DeadLetterProperties
from gateway.log.base import Record
from gateway.log.records import StoredDelivery, decode_delivery, is_newer
from gateway.model import DeadReason, UndecodableRecordError

NEWER_VERSION = "newer"
"""The reason of a dead letter in a newer format, as far as this version can tell."""


def read_dead_letter(record: Record) -> tuple[DeadLetterProperties, StoredDelivery | None]:
    """Decode a record of the dead-letter topic; the second part is None if the delivery can't be decoded."""
    reason = NEWER_VERSION if is_newer(record) else DeadReason.UNDECODABLE
    stored = None if reason == NEWER_VERSION else delivery_in(record)
    if stored is None:
        return DeadLetterProperties(id="", route="", destination="", reason=reason, at=record.appended_at), None
    delivery = stored.delivery
    letter = DeadLetterProperties(
        id=delivery.id,
        route=delivery.route,
        destination=delivery.destination,
        reason=stored.metadata.dead_reason,
        at=record.appended_at,
    )
    return letter, stored


def delivery_in(record: Record) -> StoredDelivery | None:
    """Return the delivery of a record, None if it can't be decoded. Raises NewerRecordError."""
    try:
        return decode_delivery(record)
    except UndecodableRecordError:
        return None
