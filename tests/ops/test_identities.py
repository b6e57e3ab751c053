"""The duplicates and conflicts that `gateway check` counts are those that dedupe finds in the same events."""

from collections import Counter
from dataclasses import replace

import pytest

from gateway.bodies.redaction import Redaction
from gateway.engine.dedupe.index import DedupeIndex, DedupeVerdict
from gateway.log.records import DEDUPE_ENTRY, fingerprint
from gateway.model import identity_of
from gateway.ops.identities import Seen
from gateway.rules.expressions import Expression
from gateway.text import Glob
from tests.builders import an_event
from tests.engine.test_worker import rules_of


@pytest.mark.parametrize(
    ("contents", "conflicts"), [("123", 2), ("11", 0), ("121", 1), ("1221", 1), ("12131", 2), ("1", 0)]
)
def test_conflicts_are_delivered_events_with_an_earlier_identity(contents: str, conflicts: int) -> None:
    (source,) = rules_of().sources.values()
    seen, index = Seen(replace(source, id=Expression("body.customer"))), DedupeIndex()
    events = [an_event(body={"customer": "one", "n": content}) for content in contents]
    verdicts = Counter[DedupeVerdict]()
    for offset, event in enumerate(events):
        row = DEDUPE_ENTRY.pack(identity_of(event.id) or bytes(16), fingerprint(event), offset, offset)
        verdicts[index.add(row, 1000)] += 1
    for event in reversed(events):
        seen.add(event, "place")
    assert (seen.conflicts, seen.copies) == (verdicts[DedupeVerdict.CONFLICT], verdicts[DedupeVerdict.DUPLICATE])
    assert seen.conflicts == conflicts


def test_a_type_that_is_hidden_is_counted_without_its_name() -> None:
    (source,) = rules_of().sources.values()
    hides = Redaction(body=((Glob("kind", ("kind",)),),))
    seen = Seen(replace(source, redaction=hides))
    for number, kind in enumerate(("ill", "ill", "well", "ping")):
        seen.add(an_event(type=kind, body={"kind": "none" if kind == "ping" else kind, "n": number}), "place")
    assert [(each.type, each.events) for each in seen.by_type()] == [("[redacted]", 3), ("ping", 1)]
