"""Runs of refused requests: since when each lasts and how many it has, so that its end is noticed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

PAUSE = 900.0
"""Seconds without a refusal for the same reason that end a run."""


@dataclass(slots=True, kw_only=True)
class RefusalRun:
    """A run of one source and reason. `events`: how many the source had accepted before. Times are Unix seconds."""

    since: float
    last: float
    events: float
    count: int = 0


class RefusalRuns:
    """The current run of each source and reason, both of closed sets."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, RefusalRun]] = {}

    def add(self, source: str, reason: str, *, at: float, events: float) -> None:
        runs = self._runs.setdefault(source, {})
        run = runs.get(reason)
        if run is None or at > run.last + PAUSE:
            run = runs[reason] = RefusalRun(since=at, last=at, events=events)
        run.last = max(run.last, at)
        run.count += 1

    def of(self, source: str, at: float) -> Mapping[str, RefusalRun]:
        """Return the runs that haven't ended, by reason."""
        return {reason: run for reason, run in self._runs.get(source, {}).items() if at <= run.last + PAUSE}

    def forget(self, source: str) -> None:
        self._runs.pop(source, None)

    def keep(self, sources: Collection[str]) -> None:
        """Forget the other sources: if one comes back, its events are counted from 0."""
        for name in self._runs.keys() - sources:
            del self._runs[name]
