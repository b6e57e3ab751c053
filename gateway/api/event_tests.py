"""Events as tests of the rules, as files that `gateway test` reads."""

from dataclasses import dataclass

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.bare_rules import bare_rules
from gateway.api.events import find_event
from gateway.api.problems import ApiError, Code
from gateway.api.shares import whose_turn
from gateway.model import UnreadableRecordError, UsageError
from gateway.ops.event_test import SavedTest, saved_test
from gateway.ops.log_search import find_event as find_record
from gateway.turns import TooLongError

MOST_SECONDS = 30.0
"""Of processor time: rules of 10,000 routes are read in seconds, and the event is tried twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file: its name, and its text."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTest:
    """An event as a test of the rules: the file that `gateway events export` writes of it, and what comes of it now.

    In one folder, `gateway test` passes with them as long as the rules do with the event what those in force do now:
    which routes take it, and by which method and with which body they ask. URLs and headers aren't in it, where rules
    may have a secret literally.
    `routes` are those that take it. `withheld` says where something of it was left out, or masked.
    """

    files: tuple[SavedFile, ...]
    routes: tuple[str, ...]
    withheld: tuple[str, ...]


async def get_event_test(backend: Backend, principal: Principal, *, event: str) -> EventTest:
    """Return an event as a test of the rules, for `gateway test`."""
    async with must_be_available():
        found = await find_event(backend, principal, event)
        partition = found.partition
        record = None if partition is None else await find_record(backend.log, [partition.topic], found.position)
    if record is None:
        raise ApiError(Code.NOT_FOUND, f"expected the record of {found.id} in the log, got none: it was deleted by age")
    now = backend.log.now()

    def work() -> SavedTest:
        with bare_rules(backend) as rules:
            return saved_test(rules, record, now=now)

    try:
        saved = await backend.explain(whose_turn(principal), work, MOST_SECONDS)
    except TooLongError:
        detail = f"expected an event that is tried within {MOST_SECONDS:g} s, got one with more to compute"
        raise ApiError(Code.CONFLICT, detail) from None
    except (UsageError, UnreadableRecordError) as error:
        raise ApiError(Code.CONFLICT, str(error)) from error
    return EventTest(
        files=tuple([SavedFile(name=name, text=content.decode()) for name, content in saved.files.items()]),
        routes=saved.routes,
        withheld=saved.withheld,
    )
