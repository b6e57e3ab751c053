"""When files that change are read again, and what new rules change: pure; `run.py` has the clock and the disk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.rules.rules import Rules

Stamp = tuple[int, int, int]
"""What changes with a file's content."""
Stamps = Mapping[Path, Stamp | None]
"""None for a file that isn't there."""

PATIENCE = 10
"""Looks after which files that never rest are read all the same."""


class Watch:
    """Looks at files, a second apart. Those that have changed are read once they rest: who writes them may be at it.

    A file that is cut where it is still valid YAML is a rule file with fewer routes.
    """

    def __init__(self, read: Stamps) -> None:
        self._read = read
        self._before: Stamps | None = None
        self._looks = 0

    def is_due(self, stamps: Stamps) -> bool:
        """Tell whether to read the files: they aren't what was read, and are the same as at the look before."""
        if stamps == self._read:
            self._before, self._looks = None, 0
            return False
        is_at_rest = stamps == self._before
        self._before = stamps
        self._looks += 1
        return is_at_rest or self._looks > PATIENCE

    @property
    def is_at_rest(self) -> bool:
        """Nothing has changed since the files were read, by the last look."""
        return self._before is None

    def has_read(self, stamps: Stamps) -> None:
        self._read = stamps
        self._before, self._looks = None, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What distinguishes two versions of the rules, such as `route build`. A secret's new value changes its source."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def changes(old: Rules, new: Rules) -> Changes:
    """Return what new rules change. Takes milliseconds for thousands of routes: not for the event loop."""
    return Changes(
        added=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in after if name not in before]
        ),
        changed=tuple(
            [
                f"{what} {name}"
                for what, before, after in _kinds(old, new)
                for name in after
                if name in before and before[name] != after[name]
            ]
            + ([] if old.egress == new.egress else ["egress"])
        ),
        removed=tuple(
            [f"{what} {name}" for what, before, after in _kinds(old, new) for name in before if name not in after]
        ),
    )


def _kinds(old: Rules, new: Rules) -> Iterator[tuple[str, Mapping[str, object], Mapping[str, object]]]:
    yield "source", old.sources, new.sources
    yield "destination", old.destinations, new.destinations
    yield "route", old.routes, new.routes
