"""`gateway audit`: who has done what."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from gateway.commands.base import LOG_SETTINGS, Invocation, api_arguments, api_of, command, opened_log
from gateway.commands.values import Parser, duration, positive
from gateway.log.audit_records import ActOutcome
from gateway.ops.audit import Act, UnreadableAct, is_by, read_acts
from gateway.ops.control_client import ControlClient, current_outcome
from gateway.ops.output import rfc3339, when
from gateway.ops.presentation import Row, print_rows

if TYPE_CHECKING:
    from gateway.log.base import Log, Partition

UNKNOWN = "not known: it was about to be done"


def list_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--since", type=duration, metavar="DURATION", help="only what began in the last DURATION (such as 1d)"
    )
    parser.add_argument("--who", metavar="NAME", help="only what this user did, such as ada@laptop, or ada on any host")
    parser.add_argument(
        "--limit", type=positive, default=50, metavar="N", help="show at most N, newest first (default: 50)"
    )
    api_arguments(parser)


@command(
    "audit list",
    about="list who paused, kicked, replayed or dropped something, and the result, newest first",
    example="gateway audit list --since 7d --who ada",
    add_arguments=list_arguments,
    settings=LOG_SETTINGS,
)
async def _audit_list(call: Invocation) -> int:
    if api_of(call) is not None:
        return await _list_by_api(call)
    unread: dict[Partition, str] = {}
    async with opened_log(call) as log:
        await _print(call, _acts(call, log, unread))
    for partition, reason in sorted(unread.items()):
        call.output.note(f"{partition.topic}/{partition.number}: not read: {reason}", style="yellow")
    return 1 if unread else 0


async def _list_by_api(call: Invocation) -> int:
    """Do the same by the API of a process."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_answers import act_of  # noqa: PLC0415 - a tenth of a second

    arguments = call.arguments
    unread: set[str] = set()
    async with client_of(call) as client:
        since = None if arguments.since is None else rfc3339(await client.now() - arguments.since)

        async def acts() -> AsyncGenerator[Act | UnreadableAct, None]:
            async for page in client.pages("audit", limit=arguments.limit + 1, who=arguments.who, since=since):
                unread.update(page["unread_partitions"])
                for item in page["items"]:
                    yield act_of(item)

        await _print(call, acts())
    for name in sorted(unread):
        call.output.note(f"{name}: not read", style="yellow")
    return 1 if unread else 0


async def _acts(
    call: Invocation, log: "Log", unread: "dict[Partition, str]"
) -> AsyncGenerator[Act | UnreadableAct, None]:
    """Yield what was done, as the log has it, newest first."""
    arguments = call.arguments
    since = None if arguments.since is None else log.now() - arguments.since
    control = await ControlClient(log, call.topics).control()
    async with aclosing(read_acts(log, call.topics, since=since, unread=unread)) as acts:
        async for found in acts:
            act = found if isinstance(found, UnreadableAct) else current_outcome(found, control)
            if arguments.who is None or is_by(act, arguments.who):
                yield act


async def _print(call: Invocation, found: AsyncGenerator[Act | UnreadableAct, None]) -> None:
    """Print as many acts as are asked for, and whether there are more."""
    output, limit = call.output, call.arguments.limit
    rows: list[Row] = []
    number = 0
    has_more = False
    with output.waiting("reading who has done what"):
        async with aclosing(found) as acts:
            async for act in acts:
                if has_more := number == limit:
                    break
                number += 1
                if output.json:
                    output.line(_fields(act))
                rows.append(_row(act))
    if has_more:
        output.note(f"there is more than {limit}; --limit shows it")
    if rows:
        print_rows(output, rows)
    else:
        output.print("nothing")


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
