"""The rules in force in one process: read, watched on the disk, and replaced whole or not at all.

    files ──changed, and at rest──▶ read ──▶ topics of new sources ──▶ in force
                                     └─ a problem, or no such topic ──▶ refused: those before stay in force

What is told of it (`rules_reloaded`, `rules_refused`, `/status`) says since when, and of which file.
"""

import asyncio
import gc
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import GatewayError, LogUnavailableError, UsageError
from gateway.ops.source_counts import MAX_ROUTES, InForce, SourceCounts
from gateway.required_topics import ensure_topics, specs_of
from gateway.rules.destination_credentials import certificate_ends
from gateway.rules.load import InvalidRulesError, load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import Changes, Loss, Refusal, Stamp, Watch, changes, lost_routes
from gateway.settings import Settings
from gateway.telemetry.metrics import Metrics

WATCH_EVERY = 1.0
"""Seconds between looks at the rule files. A SIGHUP looks at once, and takes them as they are."""
RELOAD_AGAIN = 5.0
"""Seconds until rules are looked at again that came while the log was away, or hadn't allowed a new source's topic."""
MAX_NAMES = 20
"""Of what a reload has changed, in each list of its log line."""
MAX_PROBLEMS = 5
"""Of refused rules that `/status` tells; the log line has all."""
REMEMBERED = 3600.0
"""Seconds for which `/status` tells of rules that had been refused, or routes that went: their time is wanted later."""


class Reloader:
    """Holds `rules`, from `load` on. `changed_to` hears of those that `watch` has put in force later.

    Set `asked` to have the files read at once, as they are.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        *,
        changed_to: Callable[[Rules], None],
    ) -> None:
        self._settings = settings
        self._topics = Topics(settings.topic_prefix)
        self._metrics = metrics
        self._logger = logger
        self._changed_to = changed_to
        self.rules: Rules
        self.asked = asyncio.Event()
        self.again = math.inf
        """When refused rules are looked at again, by the monotonic clock."""
        self.source_counts = SourceCounts(metrics.unrouted_events, metrics.let_go_events, remembered=REMEMBERED)
        self._watched: set[Path]
        self._watch: Watch
        self._read_at = time.monotonic()
        self._unchanged_at: float | None = None
        self._in_force_since: float | None = None
        self._changed: tuple[str, ...] = ()
        self._changed_at = 0.0
        self._refusal: Refusal | None = None
        self.refusal_ended = 0.0
        self._refused_routes: Mapping[str, frozenset[str]] = {}
        self._loss: Loss | None = None
        self.loss_at = 0.0

    # What `/status` tells.

    def told(self) -> Mapping[str, Any]:
        """Tell which rules are in force, since when, and which are refused."""
        metrics = self._metrics
        return {
            "file": str(self._settings.rules.absolute()),
            "refused": bool(metrics.rules_refused.value),
            "loaded_at": metrics.rules_loaded_timestamp.value,
            "since": self._in_force_since,
            "changed": self._changed,
            "changed_at": self._changed_at,
            "refusal": self._told_refusal(),
            "loss": self._told_loss(),
            "routes": len(self.rules.routes),
        }

    def told_sources(self, now: float) -> Sequence[Mapping[str, Any]]:
        """Tell what became of each source's events since the rules for it have changed; `now` is the log's time."""
        return [self._told_source(name, counts, now) for name, counts in sorted(self._counts().items())]

    def _told_refusal(self) -> Mapping[str, Any] | None:
        """Return which rules are refused, or were a while ago."""
        refusal = self._refusal
        if refusal is None or (refusal.until is not None and time.monotonic() > self.refusal_ended + REMEMBERED):
            return None
        routes = self._refused_routes
        is_told = sum(map(len, routes.values())) <= MAX_ROUTES
        return {
            **asdict(refusal),
            "problems": refusal.problems[:MAX_PROBLEMS],
            "count": len(refusal.problems),
            "routes": {source: sorted(names) for source, names in routes.items()} if is_told else {},
        }

    def _told_loss(self) -> Mapping[str, Any] | None:
        """Return which routes went a while ago, most of them at once, and how many of them are still missing."""
        loss = self._loss
        if loss is None or time.monotonic() > self.loss_at + REMEMBERED:
            return None
        missing = [name for name in loss.routes if name not in self.rules.routes]
        return {
            "since": loss.since,
            "of": loss.of,
            "reloads": loss.reloads,
            "routes": loss.routes[:MAX_NAMES],
            "count": len(loss.routes),
            "missing": len(missing),
        }

    def _told_source(self, name: str, counts: Mapping[str, float], now: float) -> Mapping[str, Any]:
        """Tell what was counted of a source since the rules for it have changed, or the process began."""
        told = self.source_counts.of(name, counts, at=time.monotonic())
        refused = {
            reason: {
                "count": run.count,
                "of": run.count + counts["events"] - run.events,
                "since": run.since,
                "last": run.last,
            }
            for reason, run in sorted(self._metrics.refusal_runs.of(name, now).items())
        }
        return {**told, "refused": refused}

    def _counts(self) -> dict[str, dict[str, float]]:
        """Return for each source how many events there were, and what has become of them."""
        metrics = self._metrics
        families = {
            "events": metrics.events,
            "duplicates": metrics.duplicates,
            "conflicts": metrics.dedupe_conflicts,
            "unrouted": metrics.unrouted,
        }
        return {
            name: {what: family.labels(name).value for what, family in families.items()} for name in self.rules.sources
        }

    # From the files into force.

    async def load(self) -> None:
        """Read the first rules. What is written after that is a change, also while the log is still being opened."""
        self._read_at = time.monotonic()
        before = await asyncio.to_thread(_stamps, [self._settings.rules])
        rules = await asyncio.to_thread(load_rules, self._settings.rules)
        self.put_in_force(rules, await asyncio.to_thread(certificate_ends, rules))
        self._watch = Watch(await asyncio.to_thread(_stamps, self._watched) | before)

    def put_in_force(self, rules: Rules, certificates: Mapping[str, float]) -> None:
        self.rules = rules
        self._watched = set(rules.files)
        self._metrics.prepare(rules)
        self._metrics.tell_certificates("destination", certificates)
        self._metrics.rules_loaded_timestamp.set(time.time())
        self._metrics.rules_refused.set(0)

    async def watch(self, log: Log) -> None:
        self._unchanged_at = log.now() - (time.monotonic() - self._read_at)
        while True:
            try:
                async with asyncio.timeout(WATCH_EVERY):
                    await self.asked.wait()
            except TimeoutError:
                pass
            await self.poll(log, now=time.monotonic())

    async def poll(self, log: Log, *, now: float) -> None:
        """Look at the rule files, and read them if they are due, or if somebody has asked for it."""
        # Stamped before reading: a change while we read is seen at the next look.
        at = log.now()
        before = await asyncio.to_thread(_stamps, self._watched)
        is_due = self._watch.is_due(before)
        if self._watch.is_at_rest and not self._is_refused:
            self._unchanged_at = at
        if not (is_due or self.asked.is_set() or (now >= self.again and self._watch.is_at_rest)):
            return
        self.asked.clear()
        self.again = math.inf if await self.read(log) else now + RELOAD_AGAIN
        seen = await asyncio.to_thread(_stamps, self._watched) | before
        self._watch.has_read({file: seen[file] for file in self._watched})

    @property
    def _is_refused(self) -> bool:
        return self._refusal is not None and self._refusal.until is None

    async def _refuse(self, error: GatewayError, log: Log) -> None:
        """Keep the rules that are in force, and tell since when others aren't, and why."""
        problems = str(error).splitlines()
        file = Path(error.problems[0].file) if isinstance(error, InvalidRulesError) else self._settings.rules
        file = file.absolute()
        stamp = (await asyncio.to_thread(_stamps, [file]))[file]
        since = log.now() if self._unchanged_at is None else self._unchanged_at
        if self._refusal is not None and self._is_refused:
            since = self._refusal.since
        self._refused_routes = {}
        self._refusal = Refusal(
            since=since,
            file=str(file),
            changed_at=None if stamp is None else stamp[0] / 1e9,
            problems=tuple(problems),
        )
        self._metrics.rules_reloads.labels("error").inc()
        self._metrics.rules_refused.set(1)
        self._logger.error("rules_refused", problems=problems, file=str(file), since=_rfc3339(since))
        if isinstance(error, InvalidRulesError):
            self._watched = {*self.rules.files, *error.files}  # a file that was missing may come

    async def read(self, log: Log) -> bool:
        """Put the rules on disk in force, whole, or keep those that are.

        False where the log was in the way: it was away, or hadn't a topic that it needs and wouldn't let us make it.
        """
        try:
            rules = await asyncio.to_thread(load_rules, self._settings.rules)
            changed = await asyncio.to_thread(changes, self.rules, rules)
            lost, before = lost_routes(self.rules, rules), self.rules.routes.keys()
            certificates = await asyncio.to_thread(certificate_ends, rules)
            added = set(specs_of(rules, self._topics)).difference(specs_of(self.rules, self._topics))
            if added:
                # The topic of a new source or ordered route is made and checked before that is served: a client's
                # request for the metadata of one that is missing must not create it with the broker's defaults.
                await log.create(sorted(added, key=attrgetter("name")))
                await ensure_topics(log, self._settings, rules, self._logger)
        except GatewayError as error:
            await self._refuse(error, log)
            return not isinstance(error, LogUnavailableError | UsageError)
        refused_since = self._take(rules, certificates, changed, log.now())
        if lost:
            self._lose(lost, before, log.now())
        self._changed_to(rules)
        spare_collector()
        self._metrics.rules_reloads.labels("ok").inc()
        told: dict[str, Any] = {
            "sources": len(rules.sources),
            "routes": len(rules.routes),
            "added": _bounded(changed.added),
            "changed": _bounded(changed.changed),
            "removed": _bounded(changed.removed),
        }
        if refused_since is not None:
            told["refused_since"] = _rfc3339(refused_since)
        if lost:
            self._logger.error("rules_reloaded", **told)
        elif changed.removed:  # meant, or a file that was cut where it is still valid
            self._logger.warning("rules_reloaded", **told)
        else:
            self._logger.info("rules_reloaded", **told)
        return True

    def _take(self, rules: Rules, certificates: Mapping[str, float], changed: Changes, now: float) -> float | None:
        """Put rules in force. Return since when others had been refused before, if they had."""
        since = None
        if self._refusal is not None and self._is_refused:
            since = self._refusal.since
            self._refusal, self.refusal_ended = replace(self._refusal, until=now), time.monotonic()
            self._refused_routes = {source: routes for source, routes in changed.touched.items() if routes}
        self.put_in_force(rules, certificates)
        if changed != Changes():
            self._in_force_since = now if self._unchanged_at is None else self._unchanged_at
            told = [f"{name} added" for name in changed.added], [f"{name} removed" for name in changed.removed]
            self._changed = tuple(_bounded([*told[0], *changed.changed, *told[1]]))
            self._changed_at = self._metrics.rules_loaded_timestamp.value
            in_force = InForce(
                since=self._in_force_since,
                loaded_at=self._changed_at,
                changed=self._changed,
            )
            self.source_counts.change(changed, self._counts(), in_force, now=now, at=time.monotonic())
            for kind, name in [text.partition(":")[0].split(" ", 1) for text in changed.changed if ":" in text]:
                if kind == "source":
                    self._metrics.refusal_runs.forget(name)
        return since

    def _lose(self, routes: tuple[str, ...], before: Collection[str], now: float) -> None:
        """Remember routes that went at once, with those of a while ago: one replay is to bring what all missed."""
        since = now if self._in_force_since is None else self._in_force_since
        loss = Loss(since=since, routes=routes, of=len(before))
        if self._loss is not None and self._told_loss() is not None:
            loss = self._loss.with_more(routes, before)
        self._loss, self.loss_at = loss, time.monotonic()


def spare_collector() -> None:
    """Have the garbage collector walk through the rules and their metrics once, instead of again and again."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Return what changes with a file's content: a symbolic link that is turned to another file counts, too."""
    stamps: dict[Path, Stamp | None] = {}
    for file in files:
        try:
            stat = file.stat()
            stamps[file] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError:
            stamps[file] = None
    return stamps


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _bounded(names: Sequence[str]) -> list[str]:
    return [*names[:MAX_NAMES], *([f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else [])]
