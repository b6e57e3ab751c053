"""`gateway route` and `destination`: pause, resume, kick."""

from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from gateway.commands.base import LOG, Call, Run, command, opened_log, wait_arguments
from gateway.commands.values import Parser
from gateway.engine.orders import Order
from gateway.model import UsageError
from gateway.ops.orders import Orders, Placed
from gateway.ops.show import count, told_of_kick, told_of_parked, told_of_unread
from gateway.ops.status import parked_of
from gateway.rules.load import check_rules
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from gateway.log.base import Partition


def _steer(kind: str, action: str) -> Run:
    def run(call: Call) -> Coroutine[Any, Any, int]:
        if not call.arguments.force:
            _check_name(call, kind, call.arguments.name)
        return _order(call, f"{kind}/{call.arguments.name}", action)

    return run


def order_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="by the rules")
    parser.add_argument("--force", action="store_true", help="though the rules don't know the name")
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
        )(_steer(_kind, _action))


async def _order(call: Call, name: str, action: str) -> int:
    kind, _, called = name.partition("/")
    shown = f"{kind} {called}"
    async with opened_log(call) as log:
        orders = Orders(log, call.topics)
        if action == "pause":
            await orders.pause(name)
            call.output.say(f"{shown} is paused; its deliveries are parked until `gateway {kind} resume {called}`")
            if call.output.json:
                call.output.line({"name": name, "state": "paused"})
            return 0
        parked: dict[str, int] = {}
        unread: dict[Partition, str] = {}
        if action == "kick" and call.arguments.wait:
            parked |= await parked_of(log, call.topics, await orders.control(), name, unread)
        placed = await (orders.resume(name) if action == "resume" else orders.kick(name))
        if placed is None:
            call.output.say(f"{shown} isn't paused: there is nothing to do")
            if call.output.json:
                call.output.line({"name": name, "state": "active", "count": 0})
            return 0
        left = told_of_parked(shown, parked, len(unread))
        return await end_of(call, orders, placed, lambda done: _steered(shown, action, done, left), parked)


def _steered(shown: str, action: str, done: Order, parked: tuple[str, str]) -> str:
    """Tell what came of a resumption or a kick, and what the latter left parked, as `told_of_parked` has it."""
    does = "goes on" if action == "resume" else "is tried"
    ordered = f"; what waits on ordered routes ({done.detail}) {does}, too, and isn't counted" if done.detail else ""
    if done.state == "cancelled":
        return f"{shown} was paused again: {count(done.count, 'delivery')} had been let go on"
    if action == "resume":
        follows = f"; {told_of_unread(done.unread)}: what is parked there goes on once it can" if done.unread else ""
        return f"resumed {shown}: {count(done.count, 'delivery', 'goes')} on{ordered}{follows}"
    kind, _, name = shown.partition(" ")
    more = f"\n  gateway status {name}" if done.got and kind == "destination" else ""
    told, commands = parked
    return f"kicked {shown}: {told_of_kick(done, told)}{ordered}{without(done)}{more}{commands}"


def without(done: Order) -> str:
    return f"; {told_of_unread(done.unread)}: not included" if done.unread else ""


async def end_of(
    call: Call, orders: Orders, placed: Placed, tell: Callable[[Order], str], parked: Mapping[str, int] | None = None
) -> int:
    """Wait, if that is asked for, until an order was carried out, and say what came of it.

    `parked` is what it leaves where it is, as in `parked_of`.
    """
    arguments, output = call.arguments, call.output
    done = None
    if arguments.wait:
        with output.waiting("the gateway is at it"):
            done = await orders.finished(placed, timeout=arguments.timeout)
    order = done or placed.order
    if output.json:
        uncounted = order.detail.split(", ") if done and order.detail else []
        told: dict[str, object] = {"order": order.key, "state": order.state, "count": order.count if done else None}
        if done and done.tried is not None:
            told |= {
                "tried": done.tried,
                "delivered": done.delivered,
                "waiting": dict(done.waits),
                "got": dict(done.got),
                "again": dict(done.again),
            }
        if done and parked:
            told["parked"] = parked
        if done and done.unread:
            told["unread_partitions"] = done.unread
        output.line(told | ({"uncounted_routes": uncounted} if uncounted else {}))
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
