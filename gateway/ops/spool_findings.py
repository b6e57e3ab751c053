"""What `gateway status` says of a process's spool: acknowledged events that are on its disk alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.engine.control.state import Control
from gateway.ops.findings import NOT_READ, WAITING, Finding

NEARLY_FULL = 0.8
"""Of its nearest limit, as for the alert GatewaySpoolFull."""
_NO_SUCH_TOPIC = "got none of this name"
"""What the reason of a topic has that is missing."""
_TOO_LARGE = " too large for the topic, and tried again"
"""What the reason of a topic has if the log takes no event of that size."""
_TOPIC_IS_FULL = "a topic whose oldest event is at the age limit takes no more, others do"
MAX_REASONS = 3


def spool_findings(spool: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield that a spool accepts no more, or nearly so; that events wait in it, and why if they aren't moved.

    Events that are being moved aren't wrong.
    """
    events, oldest, used = spool["events"], spool["oldest"], float(spool["used"])
    if spool["refuses"] or used > NEARLY_FULL:
        yield Finding(
            rank=NOT_READ,
            what="spool",
            why=f"accepts no more: {spool['refuses']}; while the log accepts none either, senders get 503"
            if spool["refuses"]
            else f"nearly full: {used:.0%} of its bytes, its age or its disk are used"
            + (f"; {_TOPIC_IS_FULL}" if used >= 1.0 else ""),
            since=oldest,
            by=where,
            next=(
                "# bring the log back: it is moved by itself. To gain time, make room on its disk, or",
                "# raise --spool-bytes or --spool-days and restart; never delete its file",
            ),
            count=events or None,
        )
    if events:
        waits = dict(spool["waits"] or {})
        reasons = [f"{topic}: {reason}" if topic else reason for topic, reason in list(waits.items())[:MAX_REASONS]]
        more = f"; and {len(waits) - MAX_REASONS} more" if len(waits) > MAX_REASONS else ""
        yield Finding(
            rank=WAITING,
            what="spool",
            why="acknowledged events that are on this process's disk alone"
            + (f", and not moved: {'; '.join(reasons)}{more}" if waits else ", and being moved to the log"),
            needs_attention=bool(waits),
            since=oldest,
            by=where,
            next=_steps(list(waits.values())),
            count=events,
        )


def _steps(reasons: Sequence[str]) -> tuple[str, ...]:
    steps = []
    if any(_NO_SUCH_TOPIC in reason for reason in reasons):
        steps.append("gateway topics create")
    if any(_TOO_LARGE in reason for reason in reasons):
        steps.append("# raise the topic's max.message.bytes again: they are moved within five minutes")
    if reasons and not steps:
        steps.append("# they are moved by themselves once the log takes them: check the brokers")
    return tuple(steps)
