"""What `gateway status` says of the index that a process keeps. No delivery depends on it, so it comes last."""

from collections.abc import Iterable, Mapping
from typing import Any

from gateway.engine.control.state import Control
from gateway.ops.findings import INDEX, Finding
from gateway.ops.secret_expiry import shown_time

BEHIND = 300.0
"""Seconds from which on an index is behind, as for the alert GatewayIndexBehind."""
NEARLY_FULL = 15 / 16
"""The share of its bound from which on the file may drop its oldest segment, which is at most a sixteenth of that."""
LITTLE_ROOM = 256 << 20
"""Bytes below which a disk is as good as full: the WAL alone takes 64 MiB."""
_DAY = 86400.0


def index_findings(index: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield that an index is held up, or else behind; that its file is at its bound; that its disk is too small.

    A file at its bound isn't wrong: it was given that bound. But searches then find nothing of what it has dropped.
    """
    yield from _delay_findings(index, where)
    size, bound = index["bytes"], index["max_bytes"]
    if size is None:
        return
    if index["oldest_age"] is not None and size >= bound * NEARLY_FULL and index["oldest_age"] < index["days"] * _DAY:
        age = shown_time(index["oldest_age"])
        yield Finding(
            rank=INDEX,
            what=_name(index),
            why=f"{_shown(size)} of {_shown(bound)} are used (--index-bytes), beyond which it drops its oldest events; "
            f"it goes back {age} of {index['days']:g} days (--index-days)",
            needs_attention=False,
            since=index["oldest"],
            by=where,
            next=("# nothing older is found; with a larger --index-bytes, what comes from now on is kept for longer",),
            count=index["events"],
        )
    room, growth = index["room"], max(0, bound - size)
    if room is not None and room < growth:
        yield Finding(
            rank=INDEX,
            what=_name(index),
            why=f"its disk has {_shown(room)} left, and it may take {_shown(growth)} more (--index-bytes)",
            needs_attention=room < LITTLE_ROOM,
            by=where,
            next=("# make room, or lower --index-bytes and restart: on a full disk the index stops, and nothing else",),
        )


def _delay_findings(index: Mapping[str, Any], where: str) -> Iterable[Finding]:
    held_up, behind = index["held_up"], index["behind"]
    if held_up is not None:
        yield Finding(
            rank=INDEX,
            what=_name(index),
            why=f"held up: {held_up['reason']}; searches find what it had before",
            since=held_up["since"],
            by=where,
            next=("# it is tried again by itself, within 30 s of what holds it up having been put right",),
        )
    elif behind is not None and behind["seconds"] > BEHIND:
        reason = behind["reason"]
        yield Finding(
            rank=INDEX,
            what=_name(index),
            why=f"{shown_time(behind['seconds'])} behind {behind['topic']}" + (f": {reason}" if reason else ""),
            since=behind["since"],
            by=where,
            next=(
                "# check the brokers; reading resumes by itself"
                if reason
                else "# one that was made anew reads some thousands of records a second: does their number fall?",
            ),
            count=behind["records"],
        )


def _name(index: Mapping[str, Any]) -> str:
    return f"index {index['file']}"


def _shown(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):,.0f} MiB"
