"""What commands and pages show of an event: without what its source's `redact` hides, wherever that is repeated.

Each function returns the same kind of thing as it takes, so that what shows it needs to know nothing of it.
"""

from dataclasses import replace

from gateway.bodies.redaction import HIDDEN, Redacted, Redaction
from gateway.client.echoes import Echoes
from gateway.model import Event
from gateway.ops.dead_letters import DeadLetter
from gateway.ops.rejected import Rejected
from gateway.rules.rules import Rules
from gateway.turns import give_way


def shown_type(rules: Rules, event: Event) -> str:
    """Return an event's type as people may see it, quickly: of one with a large body, whose source hides some, none."""
    source = rules.sources.get(event.source)
    return event.type if source is None or source.redaction is None else source.redaction.quick_type(event)


def sources_that_hide_more(before: Rules, after: Rules) -> list[str]:
    """Return the sources of which something is hidden that was shown under the former rules."""
    former = before.redactions
    return [
        name
        for name, each in after.redactions.items()
        if each != (was := former.get(name)) and (was is None or each.texts - was.texts)
    ]


class Redactions:
    """What the sources of the rules hide; nothing of a source that they don't have, or without rules."""

    def __init__(self, rules: Rules | None) -> None:
        sources = {} if rules is None else rules.sources
        self._sources = {name: source for name, source in sources.items() if source.redaction is not None}

    def of(self, source: str) -> Redaction | None:
        """Return what a source hides; None if that is nothing."""
        found = self._sources.get(source)
        return None if found is None else found.redaction

    def event(self, event: Event) -> Event:
        """Return an event as people may see it, with the headers that came."""
        redaction = self.of(event.source)
        return event if redaction is None else redaction.event(event)

    def rewritten(self, event: Event) -> Event:
        """Return an event as people may see it, with headers of the body that it has now."""
        redaction = self.of(event.source)
        return event if redaction is None else redaction.rewritten(event)

    def names(self, event: Event) -> Event:
        """Return an event whose type and key people may see; nothing else of it is changed."""
        seen = self.event(event)
        return replace(event, type=seen.type, key=seen.key)

    def echoes(self, *events: Event) -> Echoes:
        """Return what hides the values of events in other texts. Takes some milliseconds of each, once for all texts.

        Those of several are hidden together: one after the other, a part of the second may be gone with the first.
        """
        hidden = list[Redacted]()
        for event in events:
            give_way()
            if (redaction := self.of(event.source)) is not None:
                hidden.append(redaction.of(event.headers, event.query, event.body))
        return Echoes(*hidden)

    def letter(self, letter: DeadLetter) -> DeadLetter:
        """Return a dead letter as people may see it.

        Of one that can't be decoded nobody knows the source, so its values are hidden if any source hides some.
        """
        if letter.decoded is None:
            if not self._sources:
                return letter
            headers = tuple([(name, HIDDEN.encode()) for name, _ in letter.record.headers])
            return replace(letter, record=letter.record._replace(value=HIDDEN.encode(), headers=headers))
        delivery, metadata = letter.decoded.delivery, letter.decoded.metadata
        if self.of(delivery.event.source) is None:
            return letter
        echoes = self.echoes(delivery.event)
        attempts = tuple([replace(each, detail=echoes.text(each.detail)) for each in delivery.attempts])
        seen = replace(delivery, event=self.rewritten(delivery.event), attempts=attempts)
        metadata = replace(metadata, detail=echoes.text(metadata.detail))
        return replace(letter, decoded=replace(letter.decoded, delivery=seen, metadata=metadata))

    def rejected(self, rejected: Rejected) -> Rejected:
        """Return a refused request as people may see it; its body may be a list of events."""
        request = rejected.request
        source = None if request is None else self._sources.get(request.source)
        if request is None or source is None or source.redaction is None:
            return rejected
        redaction = source.redaction if source.split is None else source.redaction.below(source.split)
        seen = redaction.of(request.headers, request.query, request.body)
        return replace(rejected, request=replace(request, headers=seen.headers, query=seen.query, body=seen.body))
