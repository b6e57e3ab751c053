"""What a query asks of the index: which terms, which deliveries, which events, in which order they are best asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from gateway.index.query import Condition, Field, Query, Value
from gateway.index.statuses import Status
from gateway.index.terms import EVERY, term, text_term
from gateway.model import event_id

_OF_DELIVERIES = (Field.ROUTE, Field.DESTINATION, Field.STATUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryCondition:
    """What one delivery of an event has to be: of one of these routes, destinations and statuses; None: of any."""

    routes: frozenset[str] | None = None
    destinations: frozenset[str] | None = None
    statuses: frozenset[Status] | None = None

    def holds(self, route: str, destination: str, status: Status) -> bool:
        """Return whether a delivery is one; an event of which none is recorded has no route and destination ("")."""
        return (
            (self.routes is None or route in self.routes)
            and (self.destinations is None or destination in self.destinations)
            and (self.statuses is None or status in self.statuses)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A query as the index answers it.

    `expression` is FTS5's, None if no term is asked for. One delivery has to be `wanted`, if that isn't None, and none
    may be one of the `unwanted`. `ids` are those that the event may have, None if any; `not_ids` none that it has.
    """

    expression: str | None
    wanted: DeliveryCondition | None
    unwanted: tuple[DeliveryCondition, ...]
    ids: frozenset[str] | None
    not_ids: frozenset[str]

    @property
    def of_deliveries(self) -> tuple[DeliveryCondition, ...]:
        """What is asked of deliveries: first what is wanted, if that is anything."""
        return self.unwanted if self.wanted is None else (self.wanted, *self.unwanted)

    @property
    def needs_deliveries(self) -> bool:
        """Whether deliveries decide."""
        return bool(self.of_deliveries)


def asked_of(query: Query, sources: Iterable[str]) -> Asked:
    """Translate a query; `sources` are all that the index has: an identity is a source's own."""
    ids: frozenset[str] | None = None
    not_ids = frozenset[str]()
    known = tuple(sources)
    for condition in query.conditions:
        if condition.field is Field.ID:
            named = frozenset([value.text for value in condition.values])
        elif condition.field is Field.IDENTITY:
            named = _ids_of(condition.values, known)
        else:
            continue
        if condition.is_negated:
            not_ids |= named
        else:
            ids = named if ids is None else ids & named
    wanted = [each for each in query.conditions if each.field in _OF_DELIVERIES and not each.is_negated]
    unwanted = [each for each in query.conditions if each.field in _OF_DELIVERIES and each.is_negated]
    return Asked(
        expression=match_expression(query.conditions),
        wanted=_all_of(wanted) if wanted else None,
        unwanted=tuple([_all_of([each]) for each in unwanted]),
        ids=ids,
        not_ids=not_ids,
    )


@lru_cache(maxsize=2)
def _ids_of(identities: tuple[Value, ...], sources: tuple[str, ...]) -> frozenset[str]:
    """Return the ids that identities have in each source: the same ones for each page of a search."""
    return frozenset([event_id(source, value.text) for source in sources for value in identities])


def _all_of(conditions: Iterable[Condition]) -> DeliveryCondition:
    found: dict[Field, frozenset[str]] = {}
    for condition in conditions:
        values = frozenset([value.text for value in condition.values])
        found[condition.field] = found.get(condition.field, values) & values
    statuses = found.get(Field.STATUS)
    return DeliveryCondition(
        routes=found.get(Field.ROUTE),
        destinations=found.get(Field.DESTINATION),
        statuses=None if statuses is None else frozenset([Status(each) for each in statuses]),
    )


def match_expression(conditions: Iterable[Condition]) -> str | None:
    """Return the FTS5 expression of the conditions that terms decide, None if there are none of these."""
    wanted, unwanted = list[str](), list[str]()
    for condition in conditions:
        terms = [(found, value) for value in condition.values if (found := _term_of(condition, value)) is not None]
        if terms:
            either = " OR ".join([_quoted(found) + (" *" if value.is_prefix else "") for found, value in terms])
            (unwanted if condition.is_negated else wanted).append(f"({either})")
    if not wanted and not unwanted:
        return None
    every = " AND ".join(wanted or [_quoted(EVERY)])
    return f"({every}) NOT ({' OR '.join(unwanted)})" if unwanted else every


def _quoted(term: str) -> str:
    return '"' + term.replace('"', '""') + '"'


def _term_of(condition: Condition, value: Value) -> str | None:
    """Return the term of a value of a condition, None if no term decides it."""
    if condition.field is Field.TEXT:
        return text_term(value.text)
    if condition.field in (Field.SOURCE, Field.TYPE, Field.KEY):
        return term(condition.field, value.text)
    return term(condition.path, value.text) if condition.field is Field.BODY else None
