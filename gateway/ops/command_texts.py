"""What a command is about, in the words of the command line that would give it again."""

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection
from gateway.ops.output import rfc3339
from gateway.ops.rejected import RejectedFilter

MAX_NAMED = 10
"""Ids and positions that are named one by one."""


def command_words(command: ControlRecord) -> tuple[str, str]:
    """Return what an operator's control record commands, and on what."""
    what: str = command.kind
    on = command.name
    is_cancelled = command.state == "cancelled"
    match command.kind:
        case "pause":
            what = "pause" if command.state == "paused" else "resume"
        case "dead":
            what, on = f"dead {command.action}", dead_words(command.filter)
        case "replay" if command.selection is not None and not is_cancelled:
            on = replayed_words(command.selection)
        case "redeliver" if command.redelivery is not None and not is_cancelled:
            asked = command.redelivery
            words = [] if asked.route is None else ["--route", asked.route]
            words += [] if asked.destination is None else ["--destination", asked.destination]
            on = " ".join([asked.event, *words])
        case _:
            pass
    return (f"{what} --cancel" if is_cancelled else what), on


def replay_words(selection: Selection) -> str:
    """Return the arguments by which exactly a selection is replayed at any time; without a route, of every route."""
    words = []
    for flag, value in (
        ("--route", selection.route or None),
        ("--destination", selection.destination),
        ("--source", selection.source),
    ):
        words += [] if value is None else [flag, value]
    words += ["--from", rfc3339(selection.since)]
    words += [] if selection.until is None else ["--to", rfc3339(selection.until)]
    words += ["--undelivered"] if selection.undelivered else []
    return " ".join(words)


def replayed_words(selection: Selection) -> str:
    """Return what a replay is about; one of a single event has no time, and begins at its position."""
    if selection.since or len(selection.starts) != 1:
        return replay_words(selection)
    ((partition, offset),) = selection.starts.items()
    to = "" if selection.destination is None else f" --destination {selection.destination}"
    return f"--event {partition}@{offset} --route {selection.route}{to}"


def dead_words(which: DeadFilter) -> str:
    """Return which dead letters are meant."""
    words = _named([*which.ids, *which.records])
    for flag, value in (("route", which.route), ("destination", which.destination), ("reason", which.reason)):
        words += [] if value is None else [f"--{flag}", value]
    return " ".join([*words, *_times(which.since, which.until)]) or "--all"


def rejected_words(which: RejectedFilter) -> str:
    """Return which refused requests are meant."""
    words = _named([*which.positions])
    for flag, value in (("source", which.source), ("reason", which.reason)):
        words += [] if value is None else [f"--{flag}", value]
    return " ".join([*words, *_times(which.since, which.until)]) or "--all"


def _named(names: list[str]) -> list[str]:
    shown = names[:MAX_NAMED]
    return shown if len(shown) == len(names) else [*shown, f"and {len(names) - len(shown):,} more"]


def _times(since: float | None, until: float | None) -> list[str]:
    """Return the times as they are: durations of the command line count back from a now that is over."""
    words = [] if since is None else ["since", rfc3339(since)]
    return words + ([] if until is None else ["until", rfc3339(until)])
