"""`to: tenant-${{ body.tenant }}`: each event's values choose its destination.

When the rules are loaded, `to` is replaced by all declared destinations whose names fit the template. So it is known
without an event where a route may deliver.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import EventView
from gateway.rules.json_values import as_text
from gateway.rules.templates import Template
from gateway.text import Glob


class UndeclaredDestinationError(ExpressionError):
    """An event chooses a destination that isn't declared. Its `name`, if there is one, isn't in the message."""

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationChoice:
    """A template for the name of one of the `candidates`, and an optional fallback for other names."""

    name: Template
    candidates: frozenset[str]
    otherwise: str | None = None

    def written(self) -> dict[str, Any]:
        """Return the template and the fallback as JSON; see `read_choice`."""
        pieces = [each if isinstance(each, str) else f"${{{{ {each.as_part} }}}}" for each in self.name.pieces]
        return {"name": "".join(pieces), "otherwise": self.otherwise}

    def of(self, view: EventView) -> str:
        """Return the name of a declared destination.

        Raises UndeclaredDestinationError if the event chooses no candidate and there is no fallback, and
        ExpressionError if an expression fails.
        """
        name: str | None = None
        try:
            value = self.name.render(view)
        except MissingFieldError as error:
            problem = str(error)
        except ExpressionError as error:
            raise ExpressionError(f"to: {error}") from error
        else:
            name = as_text(value)
            if name in self.candidates:
                return name
            problem = f"expected the name of a declared destination, got {'another' if name else 'none'}"
        if self.otherwise is not None:
            return self.otherwise
        raise UndeclaredDestinationError(f"to: {problem}", name)


def fitting(template: Template, names: Iterable[str]) -> list[str]:
    """Return the names that fit a template, sorted."""
    literals = [each if isinstance(each, str) else None for each in template.pieces]
    glob = Glob(text=as_text(template.value), pieces=_around(literals))
    return sorted([name for name in names if glob.matches(name)])


def _around(literals: Iterable[str | None]) -> tuple[str, ...]:
    """Return the literal texts before, between and after the expressions, given as None."""
    pieces = [""]
    for each in literals:
        if each is None:
            pieces.append("")
        else:
            pieces[-1] += each
    return tuple(pieces)


def read_choice(written: dict[str, Any], destinations: Iterable[str]) -> DestinationChoice:
    """Parse the output of `written`. Raises ValueError or ExpressionError.

    `destinations` are the candidates. They may include names that don't fit the template: it never chooses them.
    """
    match written:
        case {"name": str(name), "otherwise": str() | None as otherwise}:
            return DestinationChoice(name=Template(name), candidates=frozenset(destinations), otherwise=otherwise)
        case _:
            raise ValueError(f"expected a template and a name, got {written}")
