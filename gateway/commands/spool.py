"""`gateway spool`: what an ingress has stored on its disk while the log took none, and how it gets to the log."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    command,
    may_drop,
    opened_log,
    yes_argument,
)
from gateway.commands.values import Parser, duration
from gateway.model import LogUnavailableError, UsageError
from gateway.ops.output import count, rfc3339, when
from gateway.ops.presentation import Row, print_rows
from gateway.spool.counting import count as count_spool
from gateway.spool.mover import Mover
from gateway.spool.report import TopicReport, Verified, list_spool, record_name, report_topic, verify_spool
from gateway.spool.store import FileStore
from gateway.spool.waiting import Waiting
from gateway.telemetry import logs
from gateway.telemetry.metrics import Metrics

LOOK_INTERVAL = 0.1


@asynccontextmanager
async def _opened(call: Invocation, *, owner: bool) -> AsyncIterator[FileStore]:
    """Open the spool. Raises UsageError without one, and if its owner is asked for while a gateway has it."""
    lines = logs.configure(json=False, level=logging.WARNING, descriptor=2)
    path = call.settings.spool.file
    try:
        if path is None:
            raise UsageError("--spool: expected sqlite:///FILE, got none")
        if owner and not path.exists():
            raise UsageError(f"--spool: expected a file, got {path}, which doesn't exist")
        store = await _open(path, owner=owner)
        try:
            yield store
        finally:
            await store.close()
    finally:
        lines.close()


async def _open(path: Path, *, owner: bool) -> FileStore:
    try:
        if owner:  # who would otherwise make a new spool of a file that has lost all that it had
            await (await FileStore.open(path, owner=False)).close()
        return await FileStore.open(path, owner=owner)
    except UsageError as error:
        raise UsageError(f"--spool: {error}") from error
    except LogUnavailableError as error:
        raise UsageError(f"--spool: {error}; the gateway that has it open moves it by itself") from error


@command(
    "spool list",
    about="list what is in a spool, by topic; also while a gateway uses it",
    example="gateway spool list --spool sqlite:///spool.db",
    settings=("spool",),
)
async def _spool_list(call: Invocation) -> int:
    output = call.output
    rows: list[Row] = []
    async with _opened(call, owner=False) as store:
        for each in await list_spool(store):
            oldest = None if each.oldest is None else rfc3339(each.oldest)
            if output.json:
                output.line({"topic": each.topic, "events": each.events, "bytes": each.bytes, "oldest": oldest})
            since = "" if each.oldest is None else when(each.oldest)
            rows.append({"topic": each.topic, "events": str(each.events), "bytes": str(each.bytes), "oldest": since})
    if rows:
        print_rows(output, rows)
    else:
        output.print("empty")
    return 0


def move_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--timeout",
        type=duration,
        default=60.0,
        metavar="DURATION",
        help="how long to wait without progress (default: 1m); what is left stays in the spool",
    )


@command(
    "spool move",
    about="move a spool to the log, of a gateway that doesn't run any more",
    example="gateway spool move --spool sqlite:///lost/spool.db --log kafka://broker1:9092",
    add_arguments=move_arguments,
    settings=("spool", *LOG_SETTINGS),
)
async def _spool_move(call: Invocation) -> int:
    output, waiting, metrics = call.output, Waiting(), Metrics(CollectorRegistry())
    async with _opened(call, owner=True) as store, opened_log(call) as log:
        await count_spool(store, waiting)
        before = waiting.records
        mover = Mover(log=log, store=store, waiting=waiting, metrics=metrics, logger=logs.get_logger("gateway"))
        moving = asyncio.create_task(mover.run(), name="spool-mover")
        try:
            with output.waiting(f"moving {count(before, 'event')}"):
                has_ended = await _until_moved(waiting, call.arguments.timeout)
        finally:
            moving.cancel()
            await asyncio.wait({moving})
        if has_ended:
            await store.give_back()
    moved, found, lost = [int(each.value) for each in (metrics.spool_moved, metrics.spool_found, metrics.spool_lost)]
    if output.json:
        reasons = dict(mover.reasons)
        output.line({"moved": moved, "found": found, "lost": lost, "left": waiting.records, "reasons": reasons})
    output.print(f"{count(moved, 'event')} moved")
    if found:
        output.print(f"{count(found, 'event')} in the log already: their appends had no answer")
    if lost:
        output.note(f"{count(lost, 'event')} lost, in damaged pages: the lines `spool_records_lost` name them")
    if waiting.records:
        output.note(f"{count(waiting.records, 'event')} left in the spool", style="red")
        for topic, reason in mover.reasons.items():
            output.note(f"{topic}: {reason}" if topic else reason, style="red")
    return 1 if waiting.records or lost else 0


async def _until_moved(waiting: Waiting, timeout: float) -> bool:
    """Return whether everything was moved; False once nothing was for `timeout` seconds."""
    left, since = waiting.records, time.monotonic()
    while waiting.records:
        await asyncio.sleep(LOOK_INTERVAL)
        if waiting.records != left:
            left, since = waiting.records, time.monotonic()
        elif time.monotonic() - since > timeout:
            return False
    return True


def drop_arguments(parser: Parser) -> None:
    parser.add_argument("--topic", required=True, metavar="TOPIC", help="what is in it for this topic, as listed")
    parser.add_argument("--dry-run", action="store_true", help="only show what it would drop")
    yes_argument(parser)


@command(
    "spool drop",
    about="give up what is in a spool for a topic that is gone for good; also while a gateway uses it",
    example="gateway spool drop --spool sqlite:///spool.db --topic gateway.events.old --dry-run",
    add_arguments=drop_arguments,
    settings=("spool",),
)
async def _spool_drop(call: Invocation) -> int:
    output, arguments = call.output, call.arguments
    async with _opened(call, owner=False) as store:
        found = {each.topic: each for each in await list_spool(store)}
        if (dropped := found.get(arguments.topic)) is None:
            names = ", ".join(sorted(found)) or "none"
            raise UsageError(f"--topic: expected one with events in the spool ({names}), got {arguments.topic}")
        if arguments.dry_run:
            _print_dropped(call, dropped)
            return 0
        if not may_drop(call, _what(dropped), warning=" They were acknowledged, and won't be delivered"):
            return 1
        with output.waiting("dropping"):
            # Not what an ingress has stored since: nobody was asked about that.
            dropped = await report_topic(store, dropped.topic, dropped.end)
            await store.drop(dropped.topic, dropped.end)
            newer = (await report_topic(store, dropped.topic, await store.end(dropped.topic))).events
    _print_dropped(call, dropped)
    if newer:
        output.note(f"{count(newer, 'event')} left that came meanwhile: `gateway spool drop` again drops them, too")
    return 0


def _print_dropped(call: Invocation, dropped: TopicReport) -> None:
    output, is_dry_run = call.output, call.arguments.dry_run
    fields = {"topic": dropped.topic, "events": dropped.events, "bytes": dropped.bytes, "dry_run": is_dry_run}
    if output.json:
        output.line({**fields, "oldest": None if dropped.oldest is None else rfc3339(dropped.oldest)})
    output.print(f"{_what(dropped)} {'would be dropped' if is_dry_run else 'dropped'}")


def _what(found: TopicReport) -> str:
    oldest = "" if found.oldest is None else f", the oldest of {rfc3339(found.oldest)}"
    return f"{count(found.events, 'event')} for {found.topic}{oldest}"


@command(
    "spool verify",
    about="read every event of a spool, around damaged pages, and say what can't be read",
    example="gateway spool verify --spool sqlite:///spool.db",
    settings=("spool",),
)
async def _spool_verify(call: Invocation) -> int:
    output = call.output
    async with _opened(call, owner=False) as store:
        with output.waiting("reading"):
            found = await verify_spool(store)
    for each in found:
        if output.json:
            output.line(_fields(each))
        tried = f", {each.tried} of them perhaps in the log already" if each.tried else ""
        output.print(f"{each.topic}: {count(each.events, 'event')} can be read{tried}")
        for lost in each.unreadable:
            last = "" if lost.end == lost.start + 1 else f" to {lost.end - 1}"
            output.note(f"{record_name(each.topic, lost.start)}{last}: lost, {lost.reason}", style="red")
        for offset, problem in each.undecodable:
            output.note(f"{record_name(each.topic, offset)}: expected an event, got: {problem}", style="red")
    if not found:
        output.print("empty")
    return 1 if any(each.lost or each.undecodable for each in found) else 0


def _fields(found: Verified) -> dict[str, object]:
    return {
        "topic": found.topic,
        "events": found.events,
        "tried": found.tried,
        "lost": [{"start": each.start, "end": each.end, "reason": each.reason} for each in found.unreadable],
        "undecodable": [{"offset": offset, "problem": problem} for offset, problem in found.undecodable],
    }
