"""`gateway route` and `gateway destination`: pause, resume, kick."""

from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gateway.commands.base import (
    LOG_SETTINGS,
    Invocation,
    Run,
    api_arguments,
    api_of,
    command,
    opened_log,
    wait_arguments,
    why_argument,
    why_not_rules,
)
from gateway.commands.stored_commands import naming_stored, to_its_end
from gateway.commands.values import Parser
from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.log.base import Log
from gateway.model import UsageError
from gateway.ops.control_client import CONFIRMED_WITHIN, ControlClient, Pause, StoredCommand
from gateway.ops.kick_report import dead_in, describe_kick, parked_besides, parked_text, paused_text, unread_text
from gateway.ops.ordered_backlog import OrderedBacklog, OrderedOutcome, ordered_backlog_of, ordered_outcome_of
from gateway.ops.output import count, rfc3339, when
from gateway.ops.waiting_records import parked_counts
from gateway.rules.load import check_rules
from gateway.rules.rules import Rules
from gateway.text import did_you_mean

if TYPE_CHECKING:
    from gateway.log.base import Partition


class CommandClient(Protocol):
    """Gives commands, and says what came of them: in the log, or by the API."""

    def pause(self, name: str) -> Coroutine[Any, Any, Pause]: ...

    async def confirmed(self, pause: Pause, *, timeout: float) -> ControlRecord | None: ...

    async def finished(self, placed: StoredCommand, *, timeout: float) -> ControlRecord | None: ...

    async def has_begun(self, placed: StoredCommand) -> bool: ...


def _runner_of(kind: str, action: str) -> Run:
    def run(call: Invocation) -> Coroutine[Any, Any, int]:
        if api_of(call) is not None:
            return _run_by_api(call, f"{kind}/{call.arguments.name}", action)
        rules = None if call.arguments.force else _check_name(call, kind, call.arguments.name)
        return _run_control(call, f"{kind}/{call.arguments.name}", action, rules)

    return run


def control_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="its name in routes.yaml")
    parser.add_argument("--force", action="store_true", help="accept a name that isn't in the local rules")
    why_argument(parser)
    wait_arguments(parser)
    api_arguments(parser)


for _kind, _name in (("route", "build-on-push"), ("destination", "ci")):
    for _action, _about in (
        ("pause", "stop the deliveries of a {}; they wait until it is resumed"),
        ("resume", "resume a paused {}, and deliver what waits"),
        ("kick", "retry a {}'s waiting deliveries now"),
    ):
        command(
            f"{_kind} {_action}",
            about=_about.format(_kind),
            example=f"gateway {_kind} {_action} {_name}",
            add_arguments=control_arguments,
            settings=("rules", *LOG_SETTINGS),
        )(_runner_of(_kind, _action))


def control_client(call: Invocation, log: Log) -> ControlClient:
    """Return what writes what a CLI command stores, with its audit records."""
    return ControlClient(log, call.topics, why=call.arguments.why)


async def _run_control(call: Invocation, name: str, action: str, rules: Rules | None) -> int:
    kind, _, called = name.partition("/")
    shown = f"{kind} {called}"
    async with opened_log(call) as log:
        client = control_client(call, log)
        if action == "pause":
            return await _pause(call, client, name)
        parked: Mapping[str, int] = {}
        paused_names: Collection[str] = ()
        unread: dict[Partition, str] = {}
        before = await ordered_backlog_of(log, call.topics, name)
        if action == "kick" and call.arguments.wait:
            paused_names = _paused_names(await client.control(), name, before, rules)
        placed = await to_its_end(call.output, client.resume(name) if action == "resume" else client.kick(name))
        if placed is None:
            return _nothing_to_resume(call, name)
        see = f"gateway status {called}" if kind == "destination" else "gateway status"
        ordered = OrderedOutcome()
        with naming_stored(call.output) as stored:
            stored.add(f"the {action} of {shown}", f"`{see}` shows what came of it")
            waited = await wait_for_outcome(call, client, placed)
            done = waited.done
            if action == "kick" and done is not None:
                # Once it has ended: it says itself what was parked meanwhile of what it had expedited.
                counts = await parked_counts(log, call.topics, await client.control(), name, unread)
                parked = parked_besides(done, counts)
            if done is not None and before.count:
                ordered = await ordered_outcome_of(log, call.topics, before, client, placed)
            if done is not None and before.ends:
                await client.record_ordered_outcome(placed, done, str(ordered) or NONE_WAITED)
        held = Held(
            parked=parked_text(shown, parked, len(unread)),
            paused=paused_text(shown, [each for each in paused_names if each not in parked]),
        )
        return print_outcome(
            call,
            placed,
            waited,
            lambda command: _outcome_text(shown, action, command, held, ordered, was_paused=placed.was_paused),
            see=see,
            parked=parked,
            ordered=ordered.as_json,
        )


async def _run_by_api(call: Invocation, name: str, action: str) -> int:
    """Do the same by the API of a process, which doesn't say what other pauses hold."""
    from gateway.commands.remote import client_of  # noqa: PLC0415 - a tenth of a second
    from gateway.ops.api_commands import ApiControl  # noqa: PLC0415 - a tenth of a second

    kind, _, called = name.partition("/")
    shown = f"{kind} {called}"
    async with client_of(call) as remote:
        client = ApiControl(remote, call.arguments.why)
        if action == "pause":
            return await _pause(call, client, name)
        placed = await to_its_end(call.output, client.resume(name) if action == "resume" else client.kick(name))
        if placed is None:
            return _nothing_to_resume(call, name)
        see = f"gateway status {called}" if kind == "destination" else "gateway status"
        with naming_stored(call.output) as stored:
            stored.add(f"the {action} of {shown}", f"`{see}` shows what came of it")
            waited = await wait_for_outcome(call, client, placed)
            ordered = OrderedOutcome()
            if action == "kick" and waited.done is not None and waited.done.state != "cancelled":
                ordered = await client.ordered_outcome(placed)
    held = Held(parked=("", ""), paused=("", ""))
    return print_outcome(
        call,
        placed,
        waited,
        lambda command: _outcome_text(shown, action, command, held, ordered, was_paused=True),
        see=see,
        ordered=ordered.as_json,
    )


NONE_WAITED = "; nothing waited on ordered routes"


def _nothing_to_resume(call: Invocation, name: str) -> int:
    call.output.print(f"{name.replace('/', ' ', 1)} isn't paused: there is nothing to do")
    if call.output.json:
        call.output.line({"name": name, "state": "active", "count": 0})
    return 0


READ_BY_ONE = "one process has read it, any others follow within a moment"
"""What a confirmed pause means: only the owner of the jobs confirms what it has read."""


async def _pause(call: Invocation, client: CommandClient, name: str) -> int:
    """Pause a name, and say whether a running process knows it: until one does, nothing has changed."""
    kind, _, called = name.partition("/")
    shown, arguments, output = f"{kind} {called}", call.arguments, call.output
    pause = await to_its_end(output, client.pause(name))
    paused, is_new = pause.command, pause.is_new
    is_confirmed: bool | None = None
    applies: ControlRecord | None = None
    if arguments.wait:
        with naming_stored(output) as stored, output.waiting("waiting for the gateway"):
            stored.add(f"the pause of {shown}", "`gateway status` shows it")
            applies = await client.confirmed(pause, timeout=min(arguments.timeout, CONFIRMED_WITHIN))
        is_confirmed = applies is not None and applies.state == "paused"
    already = "" if is_new else f" already, by {paused.by or 'someone'} since {when(paused.at)}"
    follows = f"its deliveries wait until `gateway {kind} resume {called}`"
    if is_confirmed:
        output.print(f"{shown} is paused{already}: {READ_BY_ONE}; {follows}")
    elif applies is not None:
        by = f", by {applies.by}" if applies.by else ""
        output.print(f"{shown} isn't paused any more: it was resumed meanwhile{by}")
    else:
        nobody = (
            "no process has confirmed it: is a gateway running? Once one has read it"
            if arguments.wait
            else ("once a running gateway has read it")
        )
        is_recorded = f"the pause of {shown} is recorded{already}"
        output.print(f"{is_recorded}{'; ' if arguments.wait else ', and '}{nobody}, {follows}")
    if output.json:
        fields = {"by": paused.by, "since": rfc3339(paused.at), "already": not is_new, "confirmed": is_confirmed}
        output.line({"name": name, "state": "paused" if applies is None else applies.state, **fields})
    return 1 if is_confirmed is False else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a kick leaves where it is, each as text with the commands that change that."""

    parked: tuple[str, str]
    paused: tuple[str, str]


def _paused_names(control: Control, name: str, backlog: OrderedBacklog, rules: Rules | None) -> Collection[str]:
    """Return which names ("route/…" or "destination/…") are paused and stop what a kick of `name` is about."""
    targets = {*backlog.blocked}
    for route in () if rules is None else rules.routes.values():
        targets |= {(route.name, destination) for destination in route.destinations}
    kicked = [target for target in targets if name in (f"route/{target[0]}", f"destination/{target[1]}")]
    return sorted({by for target in kicked if (by := control.paused_by(*target)) is not None})


def _outcome_text(
    shown: str, action: str, done: ControlRecord, held: Held, ordered: OrderedOutcome, *, was_paused: bool
) -> str:
    """Return the outcome of a resume or kick as text."""
    if done.state == "cancelled":
        return f"{shown} was paused again: {count(done.count, 'delivery')} had already been resumed"
    if action == "resume":
        follows = f"; {unread_text(done.unread)}: what is stored there is resumed once it can be" if done.unread else ""
        name = shown if was_paused else f"{shown}, which wasn't paused"
        return f"resumed {name}: {count(done.count, 'paused delivery')} queued{ordered}{follows}"
    kind, _, name = shown.partition(" ")
    has_failed = done.failed_by_result or (ordered.kick is not None and ordered.kick.failed_by_result)
    more = f"\n  gateway status {name}" if has_failed and kind == "destination" else ""
    if dead_in(done) or (ordered.kick is not None and dead_in(ordered.kick)):
        more += f"\n  gateway dead list --{kind} {name}"
    (parked, resume_parked), (paused, resume_paused) = held.parked, held.paused
    if str(ordered) and not done.count:
        tried = f"nothing waited for a retry{parked}{paused}"
    else:
        tried = describe_kick(done, parked, paused)
    return f"kicked {shown}: {tried}{ordered}{not_included_text(done)}{more}{resume_parked}{resume_paused}"


def not_included_text(done: ControlRecord) -> str:
    return f"; {unread_text(done.unread)}: not included" if done.unread else ""


class Waited(NamedTuple):
    """A command's outcome, None without one in time; then also whether a gateway has begun to carry it out."""

    done: ControlRecord | None
    has_begun: bool | None = None


async def wait_for_outcome(call: Invocation, client: CommandClient, placed: StoredCommand) -> Waited:
    """Wait for a command's outcome, unless `--no-wait`."""
    if not call.arguments.wait:
        return Waited(None)
    with call.output.waiting("waiting for the gateway"):
        done = await client.finished(placed, timeout=call.arguments.timeout)
    return Waited(done) if done is not None else Waited(None, await client.has_begun(placed))


def print_outcome(
    call: Invocation,
    placed: StoredCommand,
    waited: Waited,
    text_of: Callable[[ControlRecord], str],
    *,
    see: str,
    **more: object,
) -> int:
    """Print a command's outcome, or without one what is known, and the command `see` that shows what came of it.

    Values of `more` that aren't empty go into the JSON.
    """
    arguments, output = call.arguments, call.output
    done, has_begun = waited
    command = done or placed.command
    if output.json:
        fields: dict[str, object] = {
            "command": command.key,
            "state": command.state,
            "count": command.count if done else None,
        }
        if done and done.tried is not None:
            fields |= {
                "tried": done.tried,
                "delivered": done.delivered,
                "waiting": dict(done.untried_by_reason),
                "failed_by_result": dict(done.failed_by_result),
                "repeated_failures": dict(done.repeated_failures),
                "dead": done.dead,
            }
        if done and done.unread:
            fields["unreadable_partitions"] = done.unread
        if has_begun is not None:
            fields["begun"] = has_begun
        output.line(fields | ({name: value for name, value in more.items() if value} if done else {}))
    elif done:
        for line in text_of(done).splitlines():
            output.print(line)
    else:
        output.print(f"the command is recorded; {_NOT_DONE[has_begun]}. To see what came of it:")
        output.print(f"  {see}")
    return 0 if (done and done.state != "cancelled") or not arguments.wait else 1


_NOT_DONE = {
    True: "a gateway is carrying it out, which has taken longer than --timeout so far",
    False: "no gateway has begun to carry it out within --timeout: is one running? It is carried out once one runs",
    None: "it is carried out once a gateway runs",
}
"""What is known of a command without an outcome, by whether a gateway has begun to carry it out."""


def _check_name(call: Invocation, kind: str, name: str) -> Rules | None:
    """Return the rules, if they can be read. Raises UsageError if they have no such name."""
    rules, problems = check_rules(call.settings.rules, resolve=False)
    if rules is None:
        why = why_not_rules(call.settings.rules, problems)
        call.output.note(f"{why}, so the {kind} {name!r} wasn't checked")
        return None
    known: Mapping[str, object] = rules.routes if kind == "route" else rules.destinations
    other, others = ("destination", rules.destinations) if kind == "route" else ("route", rules.routes)
    if name not in known and name in others:
        raise UsageError(f"unknown {kind} {name!r}: that is a {other}; use --force to do it anyway")
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}{did_you_mean(name, known)}; use --force to do it anyway")
    return rules
