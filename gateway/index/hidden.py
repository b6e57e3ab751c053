"""What the rules hide of events (`redact:`), and so isn't found by a search either: else it could be guessed.

The file says what has been hidden in all that it has. If the rules hide more than that, it is made anew: a term can't
be taken out of it. If they hide less, only what is read from then on is found by it.
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import orjson

from gateway.bodies.redaction import Redaction
from gateway.client.echoes import Echoes
from gateway.index.file import rows
from gateway.model import Event, Headers

Redactions = Mapping[str, Redaction]
"""What is hidden, by source; nothing of a source that isn't in it."""
_NOTE = "hidden"


def seen(event: Event, redaction: Redaction | None) -> Event:
    """Return an event with the type and the key that may be seen, and otherwise as it is."""
    if redaction is None:
        return event
    shown = redaction.event(event)
    return replace(event, type=shown.type, key=shown.key)


def seen_detail(detail: str, event: Event, redaction: Redaction | None) -> str:
    """Return a message about an event without the hidden values that it repeats; HIDDEN if not all are known."""
    if redaction is None or not detail:
        return detail
    return _echoes(redaction, event.headers, event.query, event.body).text(detail)


@lru_cache(maxsize=1)
def _echoes(redaction: Redaction, headers: Headers, query: str, body: bytes) -> Echoes:
    """Return what hides an event's values. It is kept until the next one's: a delivery's attempts have one event.

    It has forms of the values that fit into a detail alone, so that it takes neither long nor much memory.
    """
    return Echoes(redaction.of(headers, query, body))


def sources_that_hide_more(connection: sqlite3.Connection, redactions: Redactions) -> list[str]:
    """Return the sources of which more is hidden than in all that the file has."""
    noted = _noted(connection)
    return sorted([name for name, each in redactions.items() if not each.texts <= noted.get(name, frozenset())])


def note(connection: sqlite3.Connection, redactions: Redactions) -> None:
    """Note what is hidden from now on, if that has changed."""
    hidden = {name: each.texts for name, each in redactions.items()}
    if hidden != _noted(connection):
        value = orjson.dumps({name: sorted(texts) for name, texts in hidden.items()}).decode()
        connection.execute("INSERT OR REPLACE INTO notes (name, value) VALUES (?, ?)", (_NOTE, value))


def _noted(connection: sqlite3.Connection) -> Mapping[str, frozenset[str]]:
    select = "SELECT json_group_array(value) FROM notes WHERE name = ?"
    found = next(iter(rows(connection, select, _NOTE)), "{}")
    return {name: frozenset(texts) for name, texts in orjson.loads(found).items()}
