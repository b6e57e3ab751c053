"""Dead letters: listed, and one of them with its attempts."""

from collections.abc import Mapping
from typing import Any

from gateway.api import dead_letters as api
from gateway.api.acts import replay_dead_letters
from gateway.console.asking import Asking
from gateway.console.page import Given, Page
from gateway.model import DeadReason

PAGE = 50
REASONS: Mapping[str, str] = {
    DeadReason.EXHAUSTED: "All attempts failed",
    DeadReason.EXPIRED: "Too old to be tried again",
    DeadReason.PERMANENT: "Refused for good",
    DeadReason.GONE: "Gone (410)",
    DeadReason.EXPRESSION_ERROR: "Its request couldn't be made",
    DeadReason.UNKNOWN_DESTINATION: "No such destination",
    DeadReason.ROUTE_REMOVED: "Its route was removed",
    DeadReason.UNDECODABLE: "Its record can't be read",
    DeadReason.TOO_LARGE: "Too large for the log",
    DeadReason.BUG: "A bug of the gateway",
}


async def dead_letters(asking: Asking, given: Given) -> Page:
    """List dead letters, newest first: the open ones, or all."""
    asked: dict[str, Any] = {
        "route": given.text("route") or None,
        "destination": given.text("destination") or None,
        "reason": given.choice("reason", (*DeadReason,)) or None,
        "include_resolved": given.is_set("all"),
    }
    page = await asking.ask(api.list_dead_letters, **asked, limit=PAGE, cursor=given.cursor())
    values = {**asked, "page": page, "is_first": given.cursor() is None, "reason_names": REASONS}
    values["acts"] = asking.may(replay_dead_letters)
    return Page(template="dead_letters.html", title="Dead letters", section="dead-letters", values=values)


async def dead_letter(asking: Asking, given: Given) -> Page:
    """Show a dead letter: what it was, why it ended, and its attempts."""
    found = await asking.ask(api.get_dead_letter, position=given.path["position"])
    values = {"letter": found.letter, "attempts": found.attempts, "reason_names": REASONS}
    return Page(
        template="dead_letter.html", title=f"Dead letter {found.letter.position}", section="dead-letters", values=values
    )
