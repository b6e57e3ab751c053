"""Why appends fail, since when, and whether that is over: by later appends, or by what the brokers say."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gateway.log.base import NO_APPENDS, Partition

MIN_FAILURE_AGE = 0.25  # Seconds without a success before the log counts as refusing: another partition may accept.
UNEXPLAINED_MAX_AGE = 10.0  # Seconds after which a failure is forgotten for which the brokers give no reason.
PARTITION_MAX_AGE = 3.0  # The same for one partition, while others accept appends.


@dataclass(slots=True, kw_only=True)
class AppendFailure:
    """Failed appends, with no success since. `is_confirmed`: the brokers have confirmed the reason."""

    began: float
    last: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)
    """By topic, in the order of the last failures."""
    is_confirmed: bool = False

    @property
    def reason(self) -> str:
        """Why the last one failed."""
        return next(reversed(self.reasons.values()))

    def add(self, topic: str, reason: str, now: float) -> None:
        """Add a failure."""
        self.last = now
        self.reasons.pop(topic, None)
        self.reasons[topic] = reason


class AppendFailures:
    """The failures of a log's appends. Pure: the times are arguments, in seconds of one clock.

    What brokers say are two arguments: `accepting`, whether each partition that had appends accepts them by now, and
    `missing`, which of their topics don't exist. They can't tell about all reasons, so a failure with another one is
    forgotten after a while.
    """

    def __init__(self) -> None:
        self._of_log: AppendFailure | None = None
        self._of_partitions: dict[Partition, AppendFailure] = {}

    @property
    def are_of_partitions(self) -> bool:
        """Whether there are partitions that `refusing` has to decide about."""
        return bool(self._of_partitions)

    def failed(self, topic: str, reason: str, now: float) -> None:
        """Note a failure that may be the whole log's. That a topic doesn't exist is none."""
        if self._of_log is None:
            self._of_log = AppendFailure(began=now)
        self._of_log.add(topic, reason, now)

    def refused(self, partition: Partition, reason: str, now: float) -> None:
        """Note that a partition has taken no append."""
        failure = self._of_partitions.setdefault(partition, AppendFailure(began=now))
        failure.add(partition.topic, f"{NO_APPENDS}: {reason}", now)

    def stored(self, topic: str, number: int) -> None:
        """Note that an append to a partition has succeeded."""
        self._of_log = None
        if self._of_partitions:
            self._of_partitions.pop(Partition(topic, number), None)

    def lasting(self, now: float) -> AppendFailure | None:
        """Return the log's failure, if none has succeeded for so long that the brokers are asked."""
        failure = self._of_log
        return None if failure is None or now < failure.began + MIN_FAILURE_AGE else failure

    def reason(
        self, failure: AppendFailure, accepting: Mapping[Partition, bool], missing: Collection[str], now: float
    ) -> str | None:
        """Return why the log takes no appends, None if it does: `failure` was lasting when the brokers were asked."""
        if self._of_log is not failure:
            return None  # an append has succeeded meanwhile
        for topic in missing:
            failure.reasons.pop(topic, None)
        if failure.reasons:
            if accepting and not any(accepting.values()):
                failure.is_confirmed = True
                return failure.reason
            if not all(accepting.values()):
                return None  # one partition's missing replicas stop no other
            if not failure.is_confirmed and now < failure.last + UNEXPLAINED_MAX_AGE:
                return failure.reason
        self._of_log = None
        return None

    def refusing(
        self, accepting: Mapping[Partition, bool], missing: Collection[str], now: float
    ) -> Mapping[Partition, str]:
        """Return which partitions take no appends while others do, and why; `accepting` is empty if nobody answered."""
        has_success = self._of_log is None or now < self._of_log.began + MIN_FAILURE_AGE
        if not has_success and len(set(accepting.values())) <= 1:
            self._of_partitions.clear()
        for partition, failure in list(self._of_partitions.items()):
            if partition.topic in missing:
                del self._of_partitions[partition]
            elif not accepting.get(partition, True):
                failure.is_confirmed = True
            elif bool(accepting) if failure.is_confirmed else now >= failure.last + PARTITION_MAX_AGE:
                del self._of_partitions[partition]
        return {partition: failure.reason for partition, failure in self._of_partitions.items()}
