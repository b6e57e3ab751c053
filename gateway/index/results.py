"""What the index answers: events, deliveries, attempts. Times are Unix seconds, by the log's clock."""

from collections.abc import Mapping
from typing import NamedTuple

from gateway.index.delivery_query import DeliveryCursor
from gateway.index.settlement import DeliverySummary
from gateway.index.statuses import Status
from gateway.log.base import Partition
from gateway.model import immutable


@immutable
class IndexedEvent:
    """An event as the index has it.

    `partition` and `offset` are where its record is; None if only a delivery's record tells of it. `summaries` are how
    far its deliveries are, each with how many there are of it; the worst ones if these are many, and `left_out` is how
    many deliveries are in none of them. `status` is the worst of all. `is_cut`: its body has more than can be found.
    """

    number: int
    """Its number in the index; the later it was appended, the higher."""
    id: str
    source: str
    type: str
    key: str | None
    received_at: float
    appended_at: float
    partition: Partition | None
    offset: int
    size: int
    """Bytes of its body."""
    is_cut: bool
    status: Status
    summaries: Mapping[DeliverySummary, int]
    left_out: int = 0

    @property
    def position(self) -> str:
        """Where its record is, as commands name it; "" if that isn't known."""
        return "" if self.partition is None else f"{self.partition.topic}/{self.partition.number}@{self.offset}"


def place_of(position: str) -> tuple[Partition, int] | None:
    """Return the partition and the offset of a position; None for something else, such as an id."""
    topic, _, place = position.rpartition("/")
    number, _, offset = place.partition("@")
    if not (topic and number.isdecimal() and offset.isdecimal()):
        return None
    return Partition(topic, int(number)), int(offset)


@immutable
class Page:
    """Events, newest first. `cursor` is where to go on, None if there are no more.

    All that were appended since `searched_to` were looked at. `is_cut_short`: there may be more on this page, but
    looking for them took too long.
    """

    events: tuple[IndexedEvent, ...]
    cursor: int | None
    searched_to: float
    is_cut_short: bool


@immutable
class IndexedAttempt:
    """An attempt of a delivery.

    `partition` and `offset` are where its own record is, which has the response; None if only its delivery's record, or
    one of those after it, tells of it.
    """

    number: int
    at: float
    seconds: float
    result: str
    status: int | None
    decision: str
    """What followed, "" if that isn't recorded."""
    detail: str
    partition: Partition | None
    offset: int


class DeliveryPlace(NamedTuple):
    """What the deliveries of an event are in order by: `replayed` in µs, 0 for none, and -1 for no `item`."""

    route: str
    destination: str
    replayed: int
    item: int
    id: str


FIRST_PLACE = DeliveryPlace("", "", -1, -1, "")
"""Before all of them."""


@immutable
class IndexedDelivery:
    """A delivery as the index has it; `replayed_at` is 0 if neither a replay nor a kick began it again.

    `due` is 0 if it isn't known. `reason` is why it waits, is paused (by which name) or is a dead letter. Its last
    record is at `offset` of `partition`; if only attempts are known of it, that is the event's.
    """

    id: str
    route: str
    destination: str
    item: int | None
    status: Status
    replayed_at: float
    due: float
    reason: str
    detail: str
    partition: Partition | None
    offset: int
    attempts: tuple[IndexedAttempt, ...]

    @property
    def place(self) -> DeliveryPlace:
        """Its place among the event's."""
        item = -1 if self.item is None else self.item
        return DeliveryPlace(self.route, self.destination, round(self.replayed_at * 1e6), item, self.id)


@immutable
class ListedDelivery:
    """A delivery beside its event, with the last of its attempts that is recorded, if one is.

    `since` is since when it is what it is: a parked one or a dead letter since its record, another since its event was
    received, or replayed. `tried` is the number of its last attempt, 0 if it wasn't attempted as far as is known.
    """

    event: IndexedEvent
    delivery: IndexedDelivery
    since: float
    tried: int

    @property
    def cursor(self) -> DeliveryCursor:
        """The place in the list behind it."""
        return DeliveryCursor(self.event.number, self.delivery.id, round(self.delivery.replayed_at * 1e6))


@immutable
class DeliveryPage:
    """Deliveries, those of the newest events first. `cursor` is where to go on, None if there are no more.

    `unrecorded_since`: of events that were appended from then on, and aren't done, some deliveries may wait without a
    record (a first attempt that hasn't ended): they aren't here. None if there are no such events.
    """

    deliveries: tuple[ListedDelivery, ...]
    cursor: DeliveryCursor | None
    is_cut_short: bool
    unrecorded_since: float | None
