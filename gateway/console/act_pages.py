"""What operators do on pages: each is a command of the API, with its reason; then the page of what comes of it."""

from collections.abc import Callable, Mapping
from typing import Any

from gateway.api import acts, command_states, redeliveries
from gateway.api import dead_letters as dead_api
from gateway.api.acts import Sent
from gateway.api.command_shapes import Act, Command, CommandState, DeadSelection, Redelivery, RedeliveryRequest
from gateway.api.json_shapes import time_of
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.quarantine_acts import RetryRefused, retry_refused
from gateway.console.asking import Asking
from gateway.console.dead_letter_pages import REASONS
from gateway.console.forms import Form, asked
from gateway.console.page import Given, Page, Redirect
from gateway.console.text import address
from gateway.ops.dead_letters import just_after
from gateway.ops.output import rfc3339

ACTS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("destinations", "pause"): acts.pause_destination,
    ("destinations", "resume"): acts.resume_destination,
    ("destinations", "kick"): acts.kick_destination,
    ("routes", "pause"): acts.pause_route,
    ("routes", "resume"): acts.resume_route,
    ("routes", "kick"): acts.kick_route,
}
DEAD: Mapping[str, Callable[..., Any]] = {"replay": acts.replay_dead_letters, "drop": acts.drop_dead_letters}
ORDERED_WITHIN = 60.0
"""Seconds after a kick within which its page waits for what ordered routes tell of it."""
SAMPLE = 200
"""Dead letters up to which their number is exact where it is reviewed."""


async def on_destination(asking: Asking, given: Given, form: Form) -> Redirect:
    """Pause, resume or kick a destination."""
    return await _on(asking, given, form, "destinations")


async def on_route(asking: Asking, given: Given, form: Form) -> Redirect:
    """Pause, resume or kick a route."""
    return await _on(asking, given, form, "routes")


async def _on(asking: Asking, given: Given, form: Form, section: str) -> Redirect:
    act, name = given.path["act"], given.path["name"]
    if (function := ACTS.get((section, act))) is None:
        raise not_found("an act")
    command: Command = await asking.ask(function, name=name, given=Act(reason=form.reason), sent=form.sent)
    return Redirect(path=address("commands", command.id) if act == "kick" else address(section, name))


async def redeliver(asking: Asking, given: Given, form: Form) -> Redirect:
    """Deliver an event again: to all that the rules give it to, or by one route to one destination."""
    names = {"route": form.text("route") or None, "destination": form.text("destination") or None}
    wanted = asked(RedeliveryRequest, {**names, "reason": form.reason})
    command = await asking.ask(acts.redeliver_event, event=given.path["event"], given=wanted, sent=form.sent)
    return Redirect(path=address("commands", command.id))


async def review(asking: Asking, given: Given) -> Page:
    """Show which dead letters would be replayed or dropped, before anything is."""
    act = given.choice("act", (*DEAD,)) or "replay"
    ids = given.texts("id")
    which: dict[str, Any] = {
        "route": given.text("route") or None,
        "destination": given.text("destination") or None,
        "reason": given.text("reason") or None,
    }
    page = await asking.ask(dead_api.list_dead_letters, **which, limit=SAMPLE)
    chosen = [each for each in page.items if not ids or each.delivery_id in ids]
    newest = max([time_of(each.at) or 0.0 for each in chosen], default=asking.now)
    counts: dict[tuple[str, str], int] = {}
    for each in chosen:
        key = (each.destination or "", each.reason)
        counts[key] = counts.get(key, 0) + 1
    values = {
        **which,
        "act": act,
        "ids": ids,
        "until": rfc3339(just_after(newest)),  # what comes while somebody reads this was reviewed by nobody
        "counts": sorted(counts.items(), key=lambda each: -each[1]),
        "number": len(ids) or len(chosen),
        "is_more": not ids and (page.next_cursor is not None or page.is_cut_short),
        "missing": len(set(ids) - {each.delivery_id for each in chosen}),
        "reason_names": REASONS,
        "acts": asking.may(DEAD[act]),
    }
    return Page(
        template="dead_review.html", title=f"{act.capitalize()} dead letters", section="dead-letters", values=values
    )


async def on_dead_letters(asking: Asking, given: Given, form: Form) -> Redirect:
    """Replay or drop the dead letters that were reviewed."""
    act = given.path["act"]
    if (function := DEAD.get(act)) is None:
        raise not_found("an act")
    if act == "drop" and form.reason is None:
        raise ApiError(Code.INVALID_REQUEST, "expected a reason for what is dropped, got none")
    ids = form.all("id")
    wanted = asked(
        DeadSelection,
        {
            "ids": list(ids),
            "route": form.text("route") or None,
            "destination": form.text("destination") or None,
            "dead_reason": form.text("dead_reason") or None,
            "until": form.text("until") or None,
            "all": not ids and form.text("all") == "1",
            "reason": form.reason,
        },
    )
    command = await asking.ask(function, given=wanted, sent=form.sent)
    return Redirect(path=address("commands", command.id))


async def command(asking: Asking, given: Given) -> Page:
    """Show what has come of a command."""
    found = await asking.ask(command_states.get_command, command=given.path["command"])
    values = {"command": found, "is_over": _is_over(found, asking.now)}
    values["again"] = await _again(asking, found)
    return Page(template="command.html", title=f"Command {found.id}", section="", values=values)


async def _again(asking: Asking, found: CommandState) -> Redelivery | None:
    """Return which event is delivered again, and what has become of each delivery; None for another command."""
    kind, _, name = found.id.partition("/")
    if kind != "redeliver":
        return None
    redelivery = await asking.try_asking(redeliveries.get_redelivery, redelivery=name)
    return None if isinstance(redelivery, ApiError) else redelivery


def _is_over(found: CommandState, now: float) -> bool:
    """Return whether there is nothing more to come, as far as is known: ordered routes tell a bit later."""
    if found.state in ("requested", "resuming"):
        return False
    given_at = time_of(found.at)
    is_recent = given_at is not None and now < given_at + ORDERED_WITHIN
    return found.ordered is None or found.ordered.is_known or not is_recent


async def on_refused(asking: Asking, given: Given, form: Form) -> Page:
    """Verify a source's refused requests again, or say what would become of them."""
    name, is_dry = given.path["name"], form.text("dry") == "1"
    # What is only tried has no key: the same form may do it in earnest afterwards.
    sent = Sent(None, form.origin) if is_dry else form.sent
    wanted = RetryRefused(dry_run=is_dry, reason=form.reason)
    report = await asking.ask(retry_refused, name=name, given=wanted, sent=sent)
    values = {"name": name, "report": report}
    return Page(template="refused_report.html", title="Refused requests", section="sources", values=values)
