"""What a kick has done, in words."""

from collections import Counter
from collections.abc import Mapping

from gateway.engine.control.records import Order
from gateway.engine.jobs.kick_outcomes import ENDED, LATER, ON_ITS_WAY
from gateway.model import SpillReason
from gateway.ops.output import count


def told_of_unread(number: int) -> str:
    """Tell how many partitions a job went without."""
    return f"{count(number, 'partition')} can't be read"


def describe_kick(done: Order, parked: str = "") -> str:
    """Tell what came of a kick: how many were tried, and why the others wait; then what is parked."""
    if not done.count:
        return f"nothing {'else ' if parked else ''}was waiting{parked}"
    if done.tried is None:
        return f"{count(done.count, 'delivery', 'is')} brought on; it isn't known how many were tried by now{parked}"
    waits = Counter[str]()
    for reason, number in done.waits.items():
        waits[WAITS.get(reason, f"wait ({reason})")] += number
    if done.rate is not None and (number := waits.pop(WAITS[ON_ITS_WAY], 0)):
        waits[f"wait (rate {done.rate:g}/s)"] += number
    parts = [f"{done.tried:,} tried now{_told_of_answers(done)}"]
    for told, number in waits.most_common():
        verb, _, why = told.partition(" ")
        said = {"wait": "waits", "are": "is"}[verb] if number == 1 else verb
        parts.append(f"{number:,} {said} {why}")
    return ("; " if done.got or done.delivered else ", ").join(parts) + parked


def told_of_parked(shown: str, parked: Mapping[str, int], unread: int) -> tuple[str, str]:
    """Tell what a kick of "route …" or "destination …" leaves parked, and why; and, a line each, how that goes on."""
    told, commands = "", ""
    for by, number in parked.items():
        kind, _, name = by.partition("/")
        who = "it" if shown == f"{kind} {name}" else f"{kind} {name}"
        told += f"; {number:,} {'is' if number == 1 else 'are'} parked: {who} is paused"
        commands += f"\n  gateway {kind} resume {name}"
    if unread:
        told += f"; {told_of_unread(unread)}: what is parked there isn't counted"
    return told, commands


def _told_of_answers(done: Order) -> str:
    """Tell what came of the tries of a kick: ", all delivered" or ": 97 delivered, 3 got 401 again, 1 got 503"."""
    if done.tried and done.delivered == done.tried:
        return ", delivered" if done.tried == 1 else ", all delivered"
    told = [f"{done.delivered:,} delivered"] if done.delivered else []
    for answer, number in sorted(done.got.items(), key=lambda each: (-each[1], each[0]))[:MOST_ANSWERS]:
        again = done.again.get(answer, 0)
        how = "" if not again else " again" if again == number else f" ({again:,} of them again)"
        told.append(f"{number:,} got {answer}{how}")
    rest = sum(done.got.values()) - sum(sorted(done.got.values(), reverse=True)[:MOST_ANSWERS])
    return (": " if told else "") + ", ".join([*told, *([f"{rest:,} got others"] if rest else [])])


MOST_ANSWERS = 5
"""Of the tries of a kick that are told apart."""


WAITS: Mapping[str, str] = {
    SpillReason.THROTTLED: "wait (Retry-After)",
    SpillReason.BREAKER_OPEN: "wait (breaker open)",
    SpillReason.PAUSED: "wait (paused)",
    SpillReason.UNKNOWN_NAME: "wait (not in the rules)",
    LATER: "wait (for another process)",
    ENDED: "are dead-lettered",
    **dict.fromkeys(
        (ON_ITS_WAY, SpillReason.LANE_FULL, SpillReason.OVERDUE, SpillReason.WINDOW_FULL), "are on the way"
    ),
}
"""Why what a kick has brought on wasn't tried by the end of it, as of several deliveries."""
