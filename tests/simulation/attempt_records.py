"""What must hold of the records of attempts: each tells an attempt that was made, and none is missing uncounted."""

from collections.abc import Iterator, Sequence

from gateway.log.attempt_records import AttemptRecord, Decision, decode_attempt_record
from gateway.model import Result, UnreadableRecordError
from gateway.settings import RecordedAttempts
from tests.simulation.ledger import CLOCK_ERROR, Ledger, ObservedAttempt
from tests.simulation.loop import EPOCH

INVARIANT = "42 attempts are recorded"


def check_counts(ledger: Ledger, process: str, *, recorded: int, dropped: int) -> None:
    """Check what a process has counted that has ended, or has nothing in memory any more."""
    kept = RecordedAttempts(ledger.plan.attempts)
    made = [each for each in ledger.attempts if each.process == process and _is_wanted(each, kept)]
    sure = [each for each in made if not each.is_cut]  # what its end has cut off has no record
    if not len(sure) <= recorded + dropped <= len(made):
        text = f"{process} made {len(sure)} to {len(made)} attempts, recorded {recorded} and dropped {dropped}"
        ledger.violate(INVARIANT, text, made[:20])
    stored = len(ledger.attempt_records[process])
    if not recorded <= stored <= recorded + dropped:
        ledger.violate(INVARIANT, f"{process} recorded {recorded} and dropped {dropped}, and {stored} are stored")


def check_records(ledger: Ledger) -> None:
    """Check that each record tells an attempt of its process, and no other record does."""
    numbers = {round(event.received_at, 6): number for number, event in ledger.events.items()}
    kept = RecordedAttempts(ledger.plan.attempts)
    for process, records in ledger.attempt_records.items():
        made: dict[object, list[ObservedAttempt]] = {}
        for each in ledger.attempts:
            if each.process == process and _is_wanted(each, kept):
                made.setdefault((each.number, each.delivery, each.attempt), []).append(each)
        for record in records:
            try:
                attempt = decode_attempt_record(record)
            except UnreadableRecordError as error:
                ledger.violate(INVARIANT, f"a record can't be read: {error}")
                continue
            number = numbers.get(round(attempt.received_at, 6), -1)
            candidates = made.get((number, attempt.delivery_id, attempt.number), [])
            told = min(_of(candidates, attempt), key=lambda each: abs(attempt.at - EPOCH - each.began), default=None)
            if told is None:
                ledger.violate(INVARIANT, f"{process} recorded what it hasn't made: {attempt}", candidates)
                continue
            candidates.remove(told)
            problems = list(_problems(ledger, told, attempt))
            if problems:
                ledger.violate(INVARIANT, f"a record tells {', '.join(problems)}: {attempt}", [told])


def _is_wanted(made: ObservedAttempt, kept: RecordedAttempts) -> bool:
    if made.result is None or kept is RecordedAttempts.OFF:
        return False
    return kept is RecordedAttempts.ALL or made.result.result is not Result.SUCCESS


def _of(candidates: Sequence[ObservedAttempt], attempt: AttemptRecord) -> Iterator[ObservedAttempt]:
    """Yield the attempts that took as long: a repeated one may have the same number."""
    for each in candidates:
        assert each.result is not None
        if each.result.seconds == attempt.seconds:
            yield each


def _problems(ledger: Ledger, made: ObservedAttempt, attempt: AttemptRecord) -> Iterator[str]:
    assert made.result is not None
    event, result = ledger.events[made.number], made.result
    if (attempt.event_id, attempt.source, attempt.type) != (event.id, event.source, event.type):
        yield "another event"
    if (attempt.route, attempt.destination) != (made.route, made.destination):
        yield "another way"
    if (attempt.result, attempt.status, attempt.retry_after) != (result.result, result.status, result.retry_after):
        yield "another result"
    if made.is_timed and abs(attempt.at - EPOCH - made.began) > 2 * ledger.plan.skew + CLOCK_ERROR:
        yield "another time"
    if (attempt.decision is Decision.DELIVERED) != (result.result is Result.SUCCESS):
        yield "what can't have followed"
