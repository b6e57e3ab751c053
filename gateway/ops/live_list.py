"""What a live list of deliveries shows, and what each key does to it: `live_display.py` draws it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_ROWS = 1000
"""Deliveries that are kept: the oldest are let go of."""
MAX_FILTER = 200  # characters

_SEQUENCES = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down"}
_KEYS = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x1b": "escape", "\x04": "q"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A delivery as the list shows it: one with the same id takes its place. `at` is in Unix seconds."""

    id: str
    at: float
    source: str
    type: str
    destination: str
    status: str
    detail: str = ""

    def matches(self, words: Sequence[str]) -> bool:
        """Return whether each of these words, which are in lower case, is in one of its texts."""
        texts = (self.id, self.source, self.type, self.destination, self.status, self.detail)
        return all(any(word in text.lower() for text in texts) for word in words)


class State(NamedTuple):
    """What there is to know of where the deliveries come from, until the next one; empty if all is well."""

    text: str


class Resend(NamedTuple):
    """That a delivery is to be sent again."""

    item: Listed


class Quit(NamedTuple):
    """That the list is to end."""


class Window(NamedTuple):
    """The rows that fit, newest first; `selected` is the index among them of the one that keys act on, None without."""

    rows: Sequence[Listed]
    selected: int | None


class LiveList:
    """The deliveries of a live list, newest first, with its filter and its selection.

    Until a key moves it, the selection is the newest row; then it stays with its delivery while others come.
    """

    def __init__(self) -> None:
        self._items: dict[str, Listed] = {}
        self._selected: str | None = None
        self._filter = ""
        self.edited: str | None = None
        """The filter while it is being typed, None otherwise."""
        self.state = ""
        """What there is to know of where the deliveries come from."""
        self.note = ""
        """What has come of the last delivery that was sent again."""
        self.dropped = 0
        """How many deliveries were let go of, as there were too many."""

    @property
    def filter(self) -> str:
        return self._filter if self.edited is None else self.edited

    @property
    def total(self) -> int:
        return len(self._items)

    def put(self, item: Listed) -> None:
        """Take a delivery in, or what has become of one that is there."""
        self._items[item.id] = item
        while len(self._items) > MAX_ROWS:
            del self._items[next(iter(self._items))]
            self.dropped += 1

    def matching(self) -> list[Listed]:
        words = self.filter.lower().split()
        return [item for item in reversed(self._items.values()) if item.matches(words)]

    def window(self, height: int) -> Window:
        """Return what is seen of it in that many lines: the selected row is always among them."""
        rows = self.matching()
        at = self._index(rows)
        if at is None:
            return Window(rows[:height], None)
        first = max(0, min(at - height // 2, len(rows) - height))
        return Window(rows[first : first + height], at - first)

    def press(self, key: str) -> Resend | Quit | None:
        """Do what a key means; return what only others can carry out."""
        if self.edited is not None:
            self._edit(key, self.edited)
            return None
        match key:
            case "q":
                return Quit()
            case "f" | "/":
                self.edited = self._filter
            case "escape":
                self._filter = ""
            case "up" | "k":
                self._move(-1)
            case "down" | "j":
                self._move(1)
            case "r":
                rows = self.matching()
                if (at := self._index(rows)) is not None:
                    return Resend(rows[at])
                self.note = "nothing to resend"
            case _:
                pass
        return None

    def _edit(self, key: str, text: str) -> None:
        match key:
            case "enter":
                self._filter, self.edited = text.strip(), None
            case "escape":
                self.edited = None
            case "backspace":
                self.edited = text[:-1]
            case _ if len(key) == 1 and key.isprintable() and len(text) < MAX_FILTER:
                self.edited = text + key
            case _:
                pass

    def _move(self, by: int) -> None:
        rows = self.matching()
        at = self._index(rows)
        if at is not None:
            self._selected = rows[max(0, min(at + by, len(rows) - 1))].id

    def _index(self, rows: Sequence[Listed]) -> int | None:
        """Return which row is selected: the newest, if none is or if the filter hides it; None if there is no row."""
        at = next((at for at, item in enumerate(rows) if item.id == self._selected), 0)
        return at if rows else None


def keys_of(text: str) -> tuple[list[str], str]:
    """Return the keys that a terminal has sent, by name or as their character, and the beginning of another one.

    An escape at the end is the key itself: what begins a sequence comes with the rest of it.
    """
    keys: list[str] = []
    at = 0
    while at < len(text):
        rest = text[at:]
        if sequence := next((each for each in _SEQUENCES if rest.startswith(each)), None):
            keys.append(_SEQUENCES[sequence])
            at += len(sequence)
        elif rest in {"\x1b[", "\x1bO"}:
            return keys, rest
        elif rest.startswith("\x1b["):  # another key, up to its final character: ECMA-48, section 5.4
            end = next((n for n, each in enumerate(rest[2:], 2) if "@" <= each <= "~"), None)
            if end is None:
                return (keys, rest) if len(rest) < MAX_FILTER else (keys, "")
            at += end + 1
        else:
            keys.append(_KEYS.get(text[at], text[at]))
            at += 1
    return keys, ""
