"""What a kick did, as text."""

from collections import Counter
from collections.abc import Iterable, Mapping

from gateway.engine.control.records import BEHIND, ENDED, HALTED, LATER, ON_ITS_WAY, UNREAD, ControlRecord
from gateway.model import SpillReason
from gateway.ops.output import count


def unread_text(number: int) -> str:
    """Return how many partitions couldn't be read, as text."""
    return f"{count(number, 'partition')} can't be read"


def describe_kick(done: ControlRecord, parked: str = "", paused: str = "") -> str:
    """Return the result of a kick: how many deliveries were tried, why the others wait, what is parked and paused."""
    if not done.count:
        nothing = "nothing else was waiting" if parked else "nothing was waiting" if paused else NOTHING_WAITED
        return f"{nothing}{parked}{paused}"
    parked += paused
    if done.tried is None:
        return f"{count(done.count, 'delivery', 'is')} expedited; it isn't known yet how many were tried{parked}"
    waits = Counter[str]()
    for reason, number in done.untried_by_reason.items():
        waits[WAITS.get(reason, f"wait ({reason})")] += number
    if done.rate is not None and (number := waits.pop(WAITS[ON_ITS_WAY], 0)):
        waits[f"wait (rate {done.rate:g}/s)"] += number
    parts = [f"{done.tried:,} tried now{_results_text(done)}"]
    if done.dead:
        parts.append(f"{done.dead:,} became {'a dead letter' if done.dead == 1 else 'dead letters'}")
    for text, number in waits.most_common():
        verb, _, why = text.partition(" ")
        inflected = {"wait": "waits", "are": "is"}[verb] if number == 1 else verb
        parts.append(f"{number:,} {inflected} {why}")
    return ("; " if done.failed_by_result or done.delivered else ", ").join(parts) + parked


def dead_in(done: ControlRecord) -> int:
    """Return how many deliveries became dead letters during a kick, tried or not."""
    return done.dead + done.untried_by_reason.get(ENDED, 0)


def parked_besides(done: ControlRecord, parked: Mapping[str, int]) -> Mapping[str, int]:
    """Return how many deliveries are parked, by the paused name, without those of which a kick says that they wait.

    `parked` are the counts after it. Where a route and its destination are paused, the destination's pause parks.
    """
    counted = done.untried_by_reason.get(SpillReason.PAUSED, 0)
    others: dict[str, int] = {}
    for by in sorted(parked):
        both = min(counted, parked[by])
        counted -= both
        if parked[by] > both:
            others[by] = parked[by] - both
    return others


def parked_text(shown: str, parked: Mapping[str, int], unread: int) -> tuple[str, str]:
    """Return what stays parked after a kick of "route …" or "destination …", and the commands that resume it."""
    text, commands = "", ""
    for by, number in parked.items():
        kind, _, name = by.partition("/")
        who = "it" if shown == f"{kind} {name}" else f"{kind} {name}"
        text += f"; {number:,} {'is' if number == 1 else 'are'} stored until {who} is resumed"
        commands += f"\n  gateway {kind} resume {name}"
    if unread:
        text += f"; {unread_text(unread)}: what is stored there isn't counted"
    return text, commands


NOTHING_WAITED = "nothing was waiting; where a breaker is open, the next delivery is the probe"
"""A kick ends a breaker's open time, but only an attempt can close it."""


def paused_text(shown: str, names: Iterable[str]) -> tuple[str, str]:
    """Return which names ("route/…" or "destination/…") are paused, and the commands that resume them."""
    text, commands = "", ""
    for by in names:
        kind, _, name = by.partition("/")
        text += f"; {'it' if shown == f'{kind} {name}' else f'{kind} {name}'} is paused"
        commands += f"\n  gateway {kind} resume {name}"
    return text, commands


def combined(outcomes: Iterable[ControlRecord], command: ControlRecord) -> ControlRecord:
    """Return a kick with its outcome on ordered routes: the sum of what their members have published."""
    waits, got, again = Counter[str](), Counter[str](), Counter[str]()
    tried = delivered = dead = number = 0
    rates: set[float | None] = set()
    for each in outcomes:
        waits.update(each.untried_by_reason)
        got.update(each.failed_by_result)
        again.update(each.repeated_failures)
        tried += each.tried or 0
        delivered += each.delivered or 0
        dead += each.dead
        number += each.count
        rates.add(each.rate)
    rate = rates.pop() if len(rates) == 1 else None
    return command.with_state(
        "done",
        count=number,
        tried=tried,
        delivered=delivered,
        untried_by_reason=waits,
        failed_by_result=got,
        repeated_failures=again,
        dead=dead,
        rate=rate,
    )


def _results_text(done: ControlRecord) -> str:
    """Return the results of a kick's attempts: ", all delivered" or ": 97 delivered, 3 got 401 again, 1 got 503"."""
    if done.tried and done.delivered == done.tried:
        return ", delivered" if done.tried == 1 else ", all delivered"
    results = [f"{done.delivered:,} delivered"] if done.delivered else []
    for answer, number in sorted(done.failed_by_result.items(), key=lambda each: (-each[1], each[0]))[:MAX_RESULTS]:
        again = done.repeated_failures.get(answer, 0)
        how = "" if not again else " again" if again == number else f" ({again:,} of them again)"
        results.append(f"{number:,} got {answer}{how}")
    rest = sum(done.failed_by_result.values()) - sum(sorted(done.failed_by_result.values(), reverse=True)[:MAX_RESULTS])
    return (": " if results else "") + ", ".join([*results, *([f"{rest:,} got others"] if rest else [])])


MAX_RESULTS = 5
"""Maximum number of distinct results shown per kick."""


WAITS: Mapping[str, str] = {
    SpillReason.THROTTLED: "wait (Retry-After)",
    SpillReason.BREAKER_OPEN: "wait (breaker open)",
    SpillReason.PAUSED: "wait (paused)",
    SpillReason.DELAYED: "wait (until their key is quiet)",
    SpillReason.UNKNOWN_NAME: "wait (not in the rules)",
    LATER: "wait (for another process)",
    ENDED: "are dead-lettered",
    BEHIND: "wait (behind an earlier event of the key)",
    HALTED: "wait (halted again)",
    UNREAD: "wait (not read yet)",
    **dict.fromkeys(
        (ON_ITS_WAY, SpillReason.LANE_FULL, SpillReason.OVERDUE, SpillReason.WINDOW_FULL), "are on the way"
    ),
}
"""Why deliveries expedited by a kick weren't tried by its end, in the plural."""
