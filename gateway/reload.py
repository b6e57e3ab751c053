"""The active rules of one process: read, watched on the disk, and replaced as a whole or not at all.

    files ──changed, and stable──▶ read ──▶ topics of new sources ──▶ active
                                    └─ a problem, or no such topic ──▶ refused: the previous rules stay active

Log lines (`rules_reloaded`, `rules_refused`) and `/status` report since when, and which file.
"""

import asyncio
import math
import re
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from gateway import garbage
from gateway.log.base import Log, TopicSpec
from gateway.log.topics import Topics
from gateway.model import Event, GatewayError, LogUnavailableError, RulesError, UsageError
from gateway.ops.certificates import undemanded_certificates
from gateway.ops.redaction import shown_type, sources_that_hide_more
from gateway.ops.route_counts import RouteCounts
from gateway.ops.secret_expiry import secret_statuses
from gateway.ops.source_counts import MAX_ROUTES, InForce, SourceCounts
from gateway.required_topics import ensure_topics, event_topics, specs_of
from gateway.rules.destination_credentials import certificate_expiries
from gateway.rules.file_stamps import Stamps, stamps_of
from gateway.rules.load import InvalidRulesError, load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import Changes, Loss, Refusal, Watch, changes, lost_routes
from gateway.settings import Role, Settings
from gateway.telemetry.metrics import Metrics
from gateway.turns import taking_turns

WATCH_INTERVAL = 1.0
"""Seconds between checks of the rule files. After a SIGHUP they are read at once, as they are."""
RELOAD_RETRY_INTERVAL = 5.0
"""Seconds until rules are read again that were refused because the log was unavailable or refused a new topic."""
SLICE = 0.002
"""Seconds of work for new rules after which others have their turn."""
MAX_NAMES = 20
"""Maximum names in each list of a reload's log line."""
MAX_PROBLEMS = 5
"""Maximum problems of refused rules in `/status`; the log line has all."""
REMEMBERED = 3600.0
"""Seconds for which `/status` still reports rules that had been refused, or routes that were removed."""
_PLACE = re.compile(r":\d+:\d+: ")
"""Line and column in a warning: those of the same one in other rules may be others."""


class Reloader:
    """Has the active `rules`, after `load`. `on_activated` is called with those that `watch` activates later.

    Set `reload_requested` to have the files read at once, as they are.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        *,
        on_activated: Callable[[Rules], None],
    ) -> None:
        self._settings = settings
        self._topics = Topics(settings.topic_prefix)
        self._metrics = metrics
        self._logger = logger
        self._on_activated = on_activated
        self.rules: Rules
        self.reload_requested = asyncio.Event()
        self.retry_at = math.inf
        """When refused rules are looked at again, by the monotonic clock."""
        for skipped in (metrics.unrouted_events, metrics.duplicate_events):
            skipped.type_of = self.type_of
        self.source_counts = SourceCounts(metrics.unrouted_events, metrics.duplicate_events, remembered=REMEMBERED)
        self.route_counts = RouteCounts(metrics.route_matches, remembered=REMEMBERED)
        self._watched: set[Path]
        self._stamps: Stamps
        """Those of the files that were read last, from right before; also others may be watched."""
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
        self._warned: frozenset[str] = frozenset()

    def event_topics(self) -> Collection[str]:
        """Return the topics that the sources of the active rules append to."""
        return event_topics(self.rules, self._topics)

    def type_of(self, event: Event) -> str:
        """Return an event's type as people may see it by the active rules."""
        return shown_type(self.rules, event)

    # For `/status`.

    def status(self) -> Mapping[str, Any]:
        """Return which rules are active, since when, and which are refused."""
        metrics = self._metrics
        return {
            "file": str(self._settings.rules.absolute()),
            "refused": bool(metrics.rules_refused.value),
            "version": self.rules.version,
            "loaded_at": metrics.rules_loaded_timestamp.value,
            "since": self._in_force_since,
            "changed": self._changed,
            "changed_at": self._changed_at,
            "refusal": self._refusal_status(),
            "loss": self._loss_status(),
            "routes": len(self.rules.routes),
        }

    def source_statuses(self, now: float) -> Sequence[Mapping[str, Any]]:
        """Return each source's counts since its rules changed; `now` is the log's time."""
        return [self._source_status(name, counts, now) for name, counts in sorted(self._counts().items())]

    def route_statuses(self) -> Mapping[str, Any]:
        """Return which routes have matched nothing since their conditions changed."""
        return self.route_counts.status(self.rules, now=time.time(), at=time.monotonic())

    def _refusal_status(self) -> Mapping[str, Any] | None:
        """Return which rules are refused, or were refused recently."""
        refusal = self._refusal
        if refusal is None or (refusal.until is not None and time.monotonic() > self.refusal_ended + REMEMBERED):
            return None
        routes = self._refused_routes
        is_short = sum(map(len, routes.values())) <= MAX_ROUTES
        return {
            **asdict(refusal),
            "problems": refusal.problems[:MAX_PROBLEMS],
            "count": len(refusal.problems),
            "routes": {source: sorted(names) for source, names in routes.items()} if is_short else {},
        }

    def _loss_status(self) -> Mapping[str, Any] | None:
        """Return which routes were recently removed, most of them at once, and how many are still missing."""
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

    def _source_status(self, name: str, counts: Mapping[str, float], now: float) -> Mapping[str, Any]:
        """Return a source's counts since its rules changed, or since the process started."""
        status = self.source_counts.of(name, counts, at=time.monotonic())
        refused = {
            reason: {
                "count": run.count,
                "of": run.count + counts["events"] - run.events,
                "since": run.since,
                "last": run.last,
            }
            for reason, run in sorted(self._metrics.refusal_runs.of(name, now).items())
        }
        secrets = (
            []
            if not self._settings.role.receives  # verifies nothing
            else secret_statuses(
                name, self.rules.sources[name].verifier.lifetimes, self._metrics.secret_uses, now=time.time(), at=now
            )
        )
        return {**status, "refused": refused, "secrets": secrets}

    def _counts(self) -> dict[str, dict[str, float]]:
        """Return for each source how many events came, how many were routed, and how many weren't delivered."""
        metrics = self._metrics
        families = {
            "events": metrics.events,
            "duplicates": metrics.duplicates,
            "conflicts": metrics.dedupe_conflicts,
            "unrouted": metrics.unrouted,
        }
        return {
            name: {
                "routed": metrics.route_matches.events.get(name, 0),
                **{what: family.labels(name).value for what, family in families.items()},
            }
            for name in self.rules.sources
        }

    # Loading and activation.

    async def load(self) -> None:
        """Read the first rules. Later writes count as changes, even while the log is still being opened."""
        self._read_at = time.monotonic()
        rules = await asyncio.to_thread(self._read_rules)
        self._metrics.prepare(rules, rules.contacts)
        self.activate(rules, await asyncio.to_thread(certificate_expiries, rules))
        self._watch = Watch(rules.stamps)

    def activate(self, rules: Rules, certificates: Mapping[str, float]) -> None:
        self.rules = rules
        self._watched, self._stamps = set(rules.stamps), rules.stamps
        self._metrics.set_certificate_expiries("destination", certificates)
        self._metrics.rules_loaded_timestamp.set(time.time())
        self._metrics.rules_refused.set(0)

    async def watch(self, log: Log) -> None:
        self._unchanged_at = log.now() - (time.monotonic() - self._read_at)
        while True:
            try:
                async with asyncio.timeout(WATCH_INTERVAL):
                    await self.reload_requested.wait()
            except TimeoutError:
                pass
            await self.poll(log, now=time.monotonic())

    async def poll(self, log: Log, *, now: float) -> None:
        """Check the rule files, and read them if they have changed and are stable, or on request."""
        at = log.now()
        before = await asyncio.to_thread(stamps_of, self._watched)
        is_due = self._watch.observe(before)
        if self._watch.is_at_rest and not self._is_refused:
            self._unchanged_at = at
        if not (is_due or self.reload_requested.is_set() or (now >= self.retry_at and self._watch.is_at_rest)):
            return
        self.reload_requested.clear()
        self.retry_at = math.inf if await self.read(log) else now + RELOAD_RETRY_INTERVAL
        # By the stamps from before it was read: a file that was written meanwhile has changed at the next check.
        read = before | dict(self._stamps)
        self._watch.mark_read({file: read[file] for file in self._watched})

    @property
    def _is_refused(self) -> bool:
        return self._refusal is not None and self._refusal.until is None

    async def _refuse(self, error: GatewayError, log: Log, read: Stamps) -> None:
        """Keep the active rules, and report since when and why newer ones are refused, of which these files are."""
        problems = str(error).splitlines()
        file = Path(error.problems[0].file) if isinstance(error, InvalidRulesError) else self._settings.rules
        file = file.absolute()
        stamp = (await asyncio.to_thread(stamps_of, [file]))[file]
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
        self._stamps = error.stamps if isinstance(error, InvalidRulesError) else read
        if self._stamps:  # what couldn't be read at all may be in the same files as before
            self._watched = {*self.rules.files, *self._stamps}  # a missing file may appear

    async def read(self, log: Log) -> bool:
        """Activate the rules on disk as a whole, or keep the active ones.

        Return False if the log prevented it: it was unavailable, or lacks a topic and didn't let us create it.
        """
        read: Stamps = {}
        try:
            with garbage.kept():
                rules, changed, certificates = await asyncio.to_thread(self._read_files, asyncio.get_running_loop())
            read = rules.stamps
            lost, before = lost_routes(self.rules, rules), self.rules.routes.keys()
            added = set(specs_of(rules, self._topics)).difference(specs_of(self.rules, self._topics))
            if added and self._settings.role is not Role.CONSOLE:
                # The topic of a new source or ordered route is created and checked before that is served: a client's
                # metadata request for a missing topic must not create it with the broker's defaults.
                await self._ensure_topics(log, rules, sorted(added, key=attrgetter("name")))
        except GatewayError as error:
            await self._refuse(error, log, read)
            return not isinstance(error, LogUnavailableError | UsageError)
        await _gently(self._metrics.creating(rules))
        former = self.rules
        refused_since = self._apply(rules, certificates, changed, log.now())
        if lost:
            self._remember_loss(lost, before, log.now())
        self._on_activated(rules)
        await _gently(self._metrics.dropping(rules, rules.contacts))
        leaving = [*former.routes.values(), *former.destinations.values(), *former.sources.values()]
        del former
        await _gently(_let_go(leaving))
        self._metrics.rules_reloads.labels("ok").inc()
        line: dict[str, Any] = {
            "version": rules.version,
            "sources": len(rules.sources),
            "routes": len(rules.routes),
            "added": _bounded(changed.added),
            "changed": _bounded(changed.changed),
            "removed": _bounded(changed.removed),
        }
        if refused_since is not None:
            line["refused_since"] = _rfc3339(refused_since)
        if lost:
            self._logger.error("rules_reloaded", **line)
        elif changed.removed:  # intended, or a file that was truncated where it is still valid
            self._logger.warning("rules_reloaded", **line)
        else:
            self._logger.info("rules_reloaded", **line)
        self.warn()
        return True

    async def _ensure_topics(self, log: Log, rules: Rules, added: Sequence[TopicSpec]) -> None:
        """Create the topics that are new, and check all. Raises LogUnavailableError, UsageError.

        What else the rules change waits with them: a secret in the same file, too.
        """
        try:
            await log.create(added)
            await ensure_topics(log, self._settings, rules, self._logger, is_start=False)
        except LogUnavailableError as error:
            names = ", ".join(_bounded([spec.name for spec in added]))
            waits = "no part of these rules is in force until they are there"
            raise LogUnavailableError(f"expected the log, for the new topics {names}, got: {error}; {waits}") from error

    def _read_files(self, loop: asyncio.AbstractEventLoop) -> tuple[Rules, Changes, Mapping[str, float]]:
        """Read the rules on disk. Return also what they change, and when their certificates expire.

        Raises RulesError, also for what nobody foresaw: there are rules that work, with which the process goes on.
        """
        try:
            with taking_turns(loop):
                rules = self._read_rules()
                return rules, changes(self.rules, rules), certificate_expiries(rules)
        except GatewayError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__, limit=-1)[0]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            # Not its text, which may have a secret in it.
            message = f"expected rules that can be read, got {type(error).__name__} in {place}: a bug of the gateway"
            raise RulesError(f"{self._settings.rules}: {message}") from error

    def _read_rules(self) -> Rules:
        """Read the rules on disk; for a console, which uses no secret, without any."""
        if self._settings.role is Role.CONSOLE:
            return load_rules(self._settings.rules, environ={}, resolve=False, reads_secrets=False)
        return load_rules(self._settings.rules)

    def warn(self) -> None:
        """Log what is doubtful in the active rules, except for what was so in those before.

        A console, which has no secrets, leaves that to the others.
        """
        if self._settings.role is Role.CONSOLE:
            return
        found = list(self.rules.warnings)
        if self._settings.role.receives:
            has_tls = bool(self._settings.connections.certificates)
            found += undemanded_certificates(self.rules, has_tls=has_tls)
        warned = frozenset([_PLACE.sub(": ", each, count=1) for each in found])
        for each in found:
            if _PLACE.sub(": ", each, count=1) not in self._warned:
                self._logger.warning("rules_warning", problem=each)
        self._warned = warned

    def _apply(self, rules: Rules, certificates: Mapping[str, float], changed: Changes, now: float) -> float | None:
        """Activate rules. Return since when newer ones had been refused before, if any."""
        since = None
        if self._refusal is not None and self._is_refused:
            since = self._refusal.since
            self._refusal, self.refusal_ended = replace(self._refusal, until=now), time.monotonic()
            self._refused_routes = {source: routes for source, routes in changed.touched.items() if routes}
        before = self.rules
        self.activate(rules, certificates)
        self.source_counts.hide_types(sources_that_hide_more(before, rules))
        if changed != Changes():
            self._in_force_since = now if self._unchanged_at is None else self._unchanged_at
            added, removed = (
                [f"{name} added" for name in changed.added],
                [f"{name} removed" for name in changed.removed],
            )
            self._changed = tuple(_bounded([*added, *changed.changed, *removed]))
            self._changed_at = self._metrics.rules_loaded_timestamp.value
            in_force = InForce(
                since=self._in_force_since,
                loaded_at=self._changed_at,
                changed=self._changed,
            )
            self.source_counts.change(changed, rules, self._counts(), in_force, now=now, at=time.monotonic())
            self.route_counts.change(changed, before, rules, in_force, now=now, at=time.monotonic())
            for text in changed.changed:
                kind, _, name = text.partition(":")[0].partition(" ")
                for source in [name] if kind == "source" else rules.sources if kind == "ingress" else ():
                    self._metrics.refusal_runs.forget(source)
                    self._metrics.secret_uses.forget(source)
        return since

    def _remember_loss(self, routes: tuple[str, ...], before: Collection[str], now: float) -> None:
        """Remember routes that were removed together, with recent ones, as one replay should cover all of them."""
        since = now if self._in_force_since is None else self._in_force_since
        loss = Loss(since=since, routes=routes, of=len(before))
        if self._loss is not None and self._loss_status() is not None:
            loss = self._loss.with_more(routes, before)
        self._loss, self.loss_at = loss, time.monotonic()


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _bounded(names: Sequence[str]) -> list[str]:
    return [*names[:MAX_NAMES], *([f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else [])]


async def _gently(steps: Iterator[None]) -> None:
    """Go through many small steps, without keeping the loop from anything else."""
    began = time.perf_counter()
    for _ in steps:
        if time.perf_counter() > began + SLICE:
            await asyncio.sleep(0)
            began = time.perf_counter()


def _let_go(parts: list[object]) -> Iterator[None]:
    """Free the parts of former rules one after another: all of them at once take tens of milliseconds."""
    while parts:
        parts.pop()
        yield
