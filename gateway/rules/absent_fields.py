"""The error for a path that leads to no field of the event."""

from gateway.model import MissingFieldError
from gateway.rules.cel_errors import shortened
from gateway.rules.conditions import Seen
from gateway.rules.event_view import EventView
from gateway.rules.json_values import json_type
from gateway.rules.scanner import FieldPath, gap_in

MAX_FIELDS_SHOWN = 20  # in a message


class AbsentFieldError(MissingFieldError):
    """A literal path leads to a field that the event doesn't have."""

    def __init__(self, path: FieldPath, view: EventView) -> None:
        super().__init__(f"{path.text} isn't there")
        self._path = path
        self._view = view

    @property
    def hint(self) -> str:
        """Suggest an expression that checks for the field, or name the value that has no fields; "" if too long.

        It has nothing from the event in it except a value's type.
        """
        path, gap = self._path, gap_in(self._path, self._view)
        parent = path.up_to(gap.depth - 1).text
        if gap.depth == 0:
            hint = self._view.why_no_body
        elif not gap.is_between_fields:
            hint = f"{parent} is {json_type(gap.parent)}"
        elif isinstance(gap.parent, list):
            hint = f"check with size({parent})"
        elif gap.key.isidentifier():
            hint = f"check with has({path.up_to(gap.depth).text})"
        else:
            hint = f"check with '{gap.key}' in {parent}"
        return hint if len(hint) <= 80 else ""  # noqa: PLR2004 - a line of a terminal

    def available_fields(self, seen: Seen = str) -> str:
        """Describe what is there instead. It has names of the event's fields, so it mustn't be logged.

        `seen` returns what may be shown of a name.
        """
        gap = gap_in(self._path, self._view)
        if gap.depth == 0:
            return self._view.why_no_body
        parent = self._path.up_to(gap.depth - 1).text
        if isinstance(gap.parent, list):
            return f"{parent} has {len(gap.parent):,} {'element' if len(gap.parent) == 1 else 'elements'}"
        if not isinstance(gap.parent, dict):
            return f"{parent} is {json_type(gap.parent)}"
        names = [shortened(seen(name)) for name in list(gap.parent)[:MAX_FIELDS_SHOWN]]
        rest = len(gap.parent) - len(names)
        return f"{parent} has: {', '.join(names) or 'nothing'}{f' and {rest:,} more' if rest else ''}"
