"""The numbers of events in the index: pure."""

from hashlib import blake2b

from gateway.model import EVENT_ID

SLOTS = 256
"""Events of one millisecond: more of them are counted to the next one. Those of one partition are in its order."""
END = (1 << 62) - 1
"""Above all events' numbers."""


def id_key(id: str) -> int:  # noqa: A002 - what it is
    """Return an integer of 63 bits that tells most ids apart; it ascends with time for those that do."""
    if EVENT_ID.fullmatch(id):
        return int(id[4:20], 16) >> 1
    return int.from_bytes(blake2b(id.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1
