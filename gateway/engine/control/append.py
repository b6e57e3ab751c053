"""Append control records, all to one partition: additional ones, which an operator has added, aren't used."""

from gateway.engine.control.records import ControlRecord
from gateway.log.base import Log, Position
from gateway.log.topics import CONTROL_PARTITION, Topics


async def append_control_record(log: Log, topics: Topics, record: ControlRecord) -> Position:
    """Store a control record. Raises LogUnavailableError or RecordTooLargeError."""
    key, value = record.encode()
    return await log.append(topics.control, key=key, value=value, headers=[], partition=CONTROL_PARTITION)
