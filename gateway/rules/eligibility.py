"""Which of the events that meet a route's conditions it takes: all, a sample, those until a time, or none.

It depends on the event alone, not on the current time: a replay gets the same answer.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Any

from gateway.rules.event_view import EventView

_HASHES = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligibility:
    """Which events a route takes at all. `sample` is a share up to 1, `expires` in Unix seconds."""

    enabled: bool = True
    sample: float = 1.0
    expires: float = inf

    def holds(self, view: EventView) -> bool:
        """Return whether the route takes an event; it depends on the time of receipt and the id."""
        return self.enabled and view.received_at < self.expires and (self.sample >= 1 or _is_in(view.id, self.sample))

    def takes_all(self, now: float) -> bool:
        """Return whether the route takes every event received at this time (Unix seconds)."""
        return self.enabled and self.sample >= 1 and now < self.expires

    def why_not(self, view: EventView) -> str | None:
        """Return the first reason not to take an event, in the rule file's words; None if there is none."""
        if not self.enabled:
            return "enabled: false"
        if view.received_at >= self.expires:
            return f"expires: at {_shown(self.expires)}, got an event received at {_shown(view.received_at)}"
        if not self.holds(view):
            return f"sample: {100 * self.sample:g}%, and this event isn't in it"
        return None

    def written(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as JSON; see `read`."""
        return (
            ({} if self.enabled else {"enabled": False})
            | ({} if self.sample == 1 else {"sample": self.sample})
            | ({} if self.expires == inf else {"expires": self.expires})
        )


def read(document: dict[str, Any]) -> Eligibility | None:
    """Parse the output of `written` in a mapping that may have other keys; None if all is default.

    Raises ValueError for anything else.
    """
    found = {key: document[key] for key in ("enabled", "sample", "expires") if key in document}
    if any(not isinstance(value, bool if key == "enabled" else int | float) for key, value in found.items()):
        raise ValueError(f"expected true or false, a share and a time, got {found}")
    return Eligibility(**found) if found else None


def _is_in(event_id: str, share: float) -> bool:
    """Return whether an event is in a sample. Each sample contains all smaller ones, whatever the route."""
    digest = hashlib.blake2b(event_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * _HASHES


def _shown(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
