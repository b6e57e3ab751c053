"""Secrets of sources that expire: what a process knows of those in its rules, and what `gateway status` says of it."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from gateway.engine.control.state import Control
from gateway.ops.findings import SOURCE, Finding
from gateway.ops.output import count
from gateway.telemetry.secret_uses import SecretUses
from gateway.verify.key_ring import SecretLifetime

EXPIRY_ALERT = 7 * 86400.0
"""Seconds before its expiry from which on a secret is reported, as by the alert."""
_UNITS = ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute"))


def secret_statuses(
    source: str, lifetimes: Sequence[SecretLifetime], uses: SecretUses, *, now: float, at: float
) -> Sequence[Mapping[str, Any]]:
    """Return a source's secrets that expire, as JSON for `/status`: when, and how many events each verified recently.

    `now` is that of the clock that signatures are checked by, `at` that of the log. The names are an interface.
    """
    last: dict[str, float] = {}
    for lifetime in lifetimes:
        last[lifetime.key] = max(lifetime.until, last.get(lifetime.key, 0.0))
    return [
        {
            "secret": lifetime.shown,
            "until": lifetime.until,
            "left": lifetime.until - now,
            "is_last": lifetime.until >= last[lifetime.key],
            "events": uses.of(source, index, at),
        }
        for index, lifetime in enumerate(lifetimes)
        if isfinite(lifetime.until)
    ]


def secret_findings(source: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield which of a source's secrets have expired or will within a week.

    That needs attention while events verify with one, or if no other lasts longer.
    """
    for each in source.get("secrets", ()):  # an older version doesn't send it
        name, left, events = source["source"], each["left"], each["events"]
        if left > EXPIRY_ALERT:
            continue
        used = f"{count(events, 'event')} verified with it in the last hour"
        if left > 0:
            why = f"{each['secret']} expires in {shown_time(left)}, and {used}"
        else:
            why = f"{each['secret']} expired {shown_time(-left)} ago"
        if each["is_last"]:
            why += "; no other lasts longer, so all requests are refused " + ("then" if left > 0 else "since then")
        yield Finding(
            rank=SOURCE,
            what=f"source {name}",
            why=why,
            needs_attention=each["is_last"] or (left > 0 and events > 0),
            until=each["until"],
            by=where,
            next=_steps(name, is_over=left <= 0, is_last=each["is_last"], is_used=events > 0),
            count=events if left > 0 else None,
        )


def expiry_findings(source: str, lifetimes: Sequence[SecretLifetime], now: float) -> Iterable[Finding]:
    """Yield the same by the rules alone, as of a time (Unix seconds): which are still in use, only an ingress knows."""
    last: dict[str, float] = {}
    for each in lifetimes:
        last[each.key] = max(each.until, last.get(each.key, 0.0))
    for each in lifetimes:
        left, is_last = each.until - now, each.until >= last[each.key]
        if left > EXPIRY_ALERT:
            continue
        why = (
            f"{each.shown} expires in {shown_time(left)}"
            if left > 0
            else f"{each.shown} expired {shown_time(-left)} ago"
        )
        if is_last:
            why += "; no other lasts longer, so all requests are refused " + ("then" if left > 0 else "since then")
        yield Finding(
            rank=SOURCE,
            what=f"source {source}",
            why=why,
            needs_attention=is_last,
            until=each.until,
            next=_steps(source, is_over=left <= 0, is_last=is_last, is_used=left > 0),
            source=source,
        )


def _steps(name: str, *, is_over: bool, is_last: bool, is_used: bool) -> tuple[str, ...]:
    explain = ("# where each secret is from, and until when it verifies:", f"gateway explain {name}")
    if is_last:
        return (*explain, "# add the sender's next secret to the rules, and have the sender use it")
    if is_over or not is_used:
        return (
            f"# remove it from the rules of source {name}, unless the sender may still repeat what it signed with it",
        )
    return (*explain, "# have the sender use the next secret, or postpone `until`")


def shown_time(seconds: float) -> str:
    """Return a time in its largest unit, as people say it."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return count(int(seconds // unit), name)
    return "less than a minute"
