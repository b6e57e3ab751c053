"""`to: tenant-${{ body.tenant }}`: a route whose events go to the destination that their own values name.

It can only be a declared one whose name the template can give: `to` is replaced by all of those when the rules are
read, so that whatever asks where a route may deliver has the answer without an event.
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
    """An event names no destination that is declared, but perhaps another `name`, which isn't in the message."""

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationChoice:
    """The destination whose name a template gives, if it is one of `candidates`; else the one for the rest."""

    name: Template
    candidates: frozenset[str]
    otherwise: str | None = None

    def written(self) -> dict[str, Any]:
        """Return the template and the destination for the rest as JSON; see `read_choice`."""
        pieces = [each if isinstance(each, str) else f"${{{{ {each.as_part} }}}}" for each in self.name.pieces]
        return {"name": "".join(pieces), "otherwise": self.otherwise}

    def of(self, view: EventView) -> str:
        """Return the name of a declared destination.

        Raises UndeclaredDestinationError for an event that names none, unless there is one for the rest, and
        ExpressionError for an expression that fails.
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
    """Return those of the names that a template can give, sorted."""
    literals = [each if isinstance(each, str) else None for each in template.pieces]
    glob = Glob(text=as_text(template.value), pieces=_around(literals))
    return sorted([name for name in names if glob.matches(name)])


def _around(literals: Iterable[str | None]) -> tuple[str, ...]:
    """Return the literal texts before, between and after the expressions, for which None stands."""
    pieces = [""]
    for each in literals:
        if each is None:
            pieces.append("")
        else:
            pieces[-1] += each
    return tuple(pieces)


def read_choice(written: dict[str, Any], destinations: Iterable[str]) -> DestinationChoice:
    """Read what `written` returned of a choice among destinations. Raises ValueError or ExpressionError.

    All of a route's may be given: those that aren't candidates are names that the template doesn't give.
    """
    match written:
        case {"name": str(name), "otherwise": str() | None as otherwise}:
            return DestinationChoice(name=Template(name), candidates=frozenset(destinations), otherwise=otherwise)
        case _:
            raise ValueError(f"expected a template and a name, got {written}")
