"""The active rules without this machine's secrets, as `gateway test` reads them: for what leaves this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.api.backend import Backend
from gateway.api.problems import ApiError, Code
from gateway.model import RulesError
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.turns import give_way


@contextmanager
def bare_rules(backend: Backend) -> Iterator[Rules]:
    """Give the active rules, without secrets. To be used aside: they may be read for that, which takes seconds.

    Raises ApiError if the files have other rules by now.
    """
    in_force = backend.rules()
    if backend.are_rules_bare:
        yield in_force
        return
    try:
        rules = load_rules(Path(backend.rules_status()["file"]), environ={}, resolve=False, reads_secrets=False)
    except RulesError as error:
        raise ApiError(
            Code.RULES_UNAVAILABLE, "the rules in the files aren't those in force: they are refused"
        ) from error
    parts: list[object] = [*rules.routes.values(), *rules.destinations.values(), *rules.sources.values()]
    try:
        if rules.version != in_force.version:
            raise ApiError(
                Code.RULES_UNAVAILABLE, "the rules in the files aren't those in force, or not yet: try again"
            )
        yield rules
    finally:
        del rules
        let_go(parts)


def let_go(parts: list[object]) -> None:
    """Free the parts of rules one after another: all of them at once would keep the event loop waiting."""
    while parts:
        parts.pop()
        give_way()
