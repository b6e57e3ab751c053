"""`gateway audit`: who has done what."""

from contextlib import aclosing
from typing import TYPE_CHECKING

from gateway.commands.base import LOG_SETTINGS, Invocation, command, opened_log
from gateway.commands.values import Parser, duration, positive
from gateway.log.audit_records import ActOutcome
from gateway.ops.audit import Act, UnreadableAct, read_acts
from gateway.ops.control_client import ControlClient, by_now
from gateway.ops.output import rfc3339, when
from gateway.ops.presentation import Row, print_rows

if TYPE_CHECKING:
    from gateway.log.base import Partition

UNKNOWN = "not known: it was about to be done"


def list_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only what began in the last DURATION (such as 1d)"
    )
    parser.add_argument("--who", metavar="NAME", help="only what this user did, such as ada@laptop, or ada on any host")
    parser.add_argument(
        "--limit", type=positive, default=50, metavar="N", help="show at most N, newest first (default: 50)"
    )


@command(
    "audit list",
    about="list who paused, kicked, replayed or dropped something, and the result, newest first",
    example="gateway audit list --since 7d --who ada",
    add_arguments=list_arguments,
    settings=LOG_SETTINGS,
)
async def _audit_list(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    rows: list[Row] = []
    number = 0
    has_more = False
    unread: dict[Partition, str] = {}
    async with opened_log(call) as log:
        since = None if arguments.since is None else log.now() - arguments.since
        with output.waiting("reading who has done what"):
            control = await ControlClient(log, call.topics).control()
            async with aclosing(read_acts(log, call.topics, since=since, unread=unread)) as acts:
                async for found in acts:
                    act = found if isinstance(found, UnreadableAct) else by_now(found, control)
                    if arguments.who is not None and not _is_by(act, arguments.who):
                        continue
                    if has_more := number == arguments.limit:
                        break
                    number += 1
                    if output.json:
                        output.line(_fields(act))
                    rows.append(_row(act))
    for partition, reason in sorted(unread.items()):
        output.note(f"{partition.topic}/{partition.number}: not read: {reason}", style="yellow")
    if has_more:
        output.note(f"there is more than {arguments.limit}; --limit shows it")
    if rows:
        print_rows(output, rows)
    else:
        output.print("nothing")
    return 1 if unread else 0


def _is_by(act: Act | UnreadableAct, name: str) -> bool:
    if isinstance(act, UnreadableAct):
        return False
    who = act.record.who
    return name in (who, who.rpartition("@")[0])


def _fields(act: Act | UnreadableAct) -> dict[str, object]:
    if isinstance(act, UnreadableAct):
        return {"at": rfc3339(act.at), "position": act.position, "problem": act.problem}
    record = act.record
    return {
        "at": rfc3339(record.at),
        "id": record.id,
        "who": record.who,
        "via": record.via,
        "proven": record.is_proven,
        "from": record.origin,
        "what": record.what,
        "on": record.on,
        "why": record.why or None,
        "outcome": None if act.outcome is ActOutcome.BEGUN else act.outcome,
        "detail": act.detail or None,
        "outcome_at": None if act.ended_at is None else rfc3339(act.ended_at),
    }


def _row(act: Act | UnreadableAct) -> Row:
    if isinstance(act, UnreadableAct):
        cells = {"when": when(act.at), "who": "", "from": "", "what": f"{act.position} can't be read: {act.problem}"}
        return {**cells, "why": "", "what came of it": ""}
    record = act.record
    came = UNKNOWN if act.outcome is ActOutcome.BEGUN else act.outcome + (f": {act.detail}" if act.detail else "")
    return {
        "when": when(record.at),
        "who": record.who if record.is_proven else f"{record.who} (claimed)",
        "from": record.origin if record.via == "command" else f"{record.origin}, {record.via}",
        "what": f"{record.what} {record.on}",
        "why": record.why,
        "what came of it": came,
    }
