"""`gateway route` and `destination`: pause, resume, kick."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from gateway.commands.base import LOG, Call, Run, command, opened_log, wait_arguments
from gateway.commands.values import Parser
from gateway.engine.control.records import Order
from gateway.model import UsageError
from gateway.ops.control_client import ControlClient, StoredCommand
from gateway.ops.kick_report import describe_kick, told_of_parked, told_of_unread
from gateway.ops.ordered_backlog import OrderedBacklog, ordered_backlog_of, unfinished_before
from gateway.ops.output import count, rfc3339, when
from gateway.ops.status import parked_of
from gateway.rules.load import check_rules
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from gateway.log.base import Log, Partition
    from gateway.log.topics import Topics


def _runner_of(kind: str, action: str) -> Run:
    def run(call: Call) -> Coroutine[Any, Any, int]:
        if not call.arguments.force:
            _check_name(call, kind, call.arguments.name)
        return _order(call, f"{kind}/{call.arguments.name}", action)

    return run


def order_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="its name in routes.yaml")
    parser.add_argument("--force", action="store_true", help="even if the rules have no such name")
    wait_arguments(parser)


for _kind, _name in (("route", "build-on-push"), ("destination", "ci")):
    for _action, _about in (
        ("pause", "stop the deliveries of a {}; they are parked until it is resumed"),
        ("resume", "let a paused {} go on, with what was parked meanwhile"),
        ("kick", "try now what waits for a retry of a {}"),
    ):
        command(
            f"{_kind} {_action}",
            about=_about.format(_kind),
            example=f"gateway {_kind} {_action} {_name}",
            takes=order_arguments,
            settings=("rules", *LOG),
        )(_runner_of(_kind, _action))


async def _order(call: Call, name: str, action: str) -> int:
    kind, _, called = name.partition("/")
    shown = f"{kind} {called}"
    async with opened_log(call) as log:
        orders = ControlClient(log, call.topics)
        if action == "pause":
            paused, is_new = await orders.pause(name)
            already = "" if is_new else f" already, by {paused.by or 'somebody'} since {when(paused.at)}"
            follows = f"its deliveries are parked until `gateway {kind} resume {called}`"
            call.output.say(f"{shown} is paused{already}; {follows}")
            if call.output.json:
                told = {"by": paused.by, "since": rfc3339(paused.at), "already": not is_new}
                call.output.line({"name": name, "state": "paused", **told})
            return 0
        parked: dict[str, int] = {}
        unread: dict[Partition, str] = {}
        before = await ordered_backlog_of(log, call.topics, name)
        if action == "kick" and call.arguments.wait:
            parked |= await parked_of(log, call.topics, await orders.control(), name, unread)
        placed = await (orders.resume(name) if action == "resume" else orders.kick(name))
        if placed is None:
            call.output.say(f"{shown} isn't paused: there is nothing to do")
            if call.output.json:
                call.output.line({"name": name, "state": "active", "count": 0})
            return 0
        left = told_of_parked(shown, parked, len(unread))
        done = await carried_out(call, orders, placed)
        ordered = Counts()
        if done is not None and before.count:
            ordered = Counts(waited=before.count, wait=await _left_of(log, call.topics, before))
        return say_end(
            call,
            placed,
            done,
            lambda order: _outcome_text(shown, action, order, left, ordered),
            parked=parked,
            ordered=ordered.told,
        )


POLLS, POLL_INTERVAL = 12, 0.25
"""Looks and seconds between them: ordered routes do what they are told within some seconds, with an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of the deliveries of ordered routes: how many waited before an order, and how many of them wait still."""

    waited: int = 0
    wait: int = 0

    @property
    def told(self) -> Mapping[str, object]:
        return {"waited": self.waited, "waiting": self.wait} if self.waited else {}

    @override
    def __str__(self) -> str:
        """Tell of them at the end of a line, empty where there were none."""
        if not self.waited:
            return ""
        wait = f"{self.wait:,} of them {'waits' if self.wait == 1 else 'wait'} still" if self.wait else "none waits now"
        return f"; on ordered routes {self.waited:,} waited, {wait}"


async def _left_of(log: "Log", topics: "Topics", before: OrderedBacklog) -> int:
    """Return how many are left of what waited on ordered routes, once none is or a moment has passed."""
    left = await unfinished_before(log, topics, before.ends)
    for _ in range(POLLS):
        if not left:
            break
        await asyncio.sleep(POLL_INTERVAL)
        left = await unfinished_before(log, topics, before.ends)
    return left


def _outcome_text(shown: str, action: str, done: Order, parked: tuple[str, str], ordered: Counts) -> str:
    """Tell what came of a resumption or a kick, and what the latter left parked, as `told_of_parked` has it."""
    if done.state == "cancelled":
        return f"{shown} was paused again: {count(done.count, 'delivery')} had been let go on"
    if action == "resume":
        follows = f"; {told_of_unread(done.unread)}: what is parked there goes on once it can" if done.unread else ""
        return f"resumed {shown}: {count(done.count, 'delivery', 'goes')} on{ordered}{follows}"
    kind, _, name = shown.partition(" ")
    more = f"\n  gateway status {name}" if done.got and kind == "destination" else ""
    told, commands = parked
    tried = f"nothing waited for a retry{told}" if ordered.waited and not done.count else describe_kick(done, told)
    return f"kicked {shown}: {tried}{ordered}{without(done)}{more}{commands}"


def without(done: Order) -> str:
    return f"; {told_of_unread(done.unread)}: not included" if done.unread else ""


async def carried_out(call: Call, orders: ControlClient, placed: StoredCommand) -> Order | None:
    """Wait, if that is asked for, until an order was carried out; None if not."""
    if not call.arguments.wait:
        return None
    with call.output.waiting("the gateway is at it"):
        return await orders.finished(placed, timeout=call.arguments.timeout)


def say_end(
    call: Call,
    placed: StoredCommand,
    done: Order | None,
    tell: Callable[[Order], str],
    **more: object,
) -> int:
    """Say what came of an order, if it was waited for; what there is of `more` goes into the JSON."""
    arguments, output = call.arguments, call.output
    order = done or placed.order
    if output.json:
        told: dict[str, object] = {"order": order.key, "state": order.state, "count": order.count if done else None}
        if done and done.tried is not None:
            told |= {
                "tried": done.tried,
                "delivered": done.delivered,
                "waiting": dict(done.waits),
                "got": dict(done.got),
                "again": dict(done.again),
            }
        if done and done.unread:
            told["unread_partitions"] = done.unread
        output.line(told | ({name: value for name, value in more.items() if value} if done else {}))
    elif done:
        for line in tell(done).splitlines():
            output.say(line)
    else:
        output.say("the order is stored; a running gateway carries it out")
    return 0 if (done and done.state != "cancelled") or not arguments.wait else 1


def _check_name(call: Call, kind: str, name: str) -> None:
    rules, _ = check_rules(call.settings.rules, resolve=False)
    if rules is None:
        call.output.note(f"{call.settings.rules} can't be read, so it isn't known whether there is a {kind} {name!r}")
        return
    known: Mapping[str, object] = rules.routes if kind == "route" else rules.destinations
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}{did_you_mean(name, known)}; --force does it all the same")
