"""`gateway run`: one process, from its rules to its last commit. One TaskGroup owns everything that goes on in it.

start   rules ─▶ log ─▶ topics checked ─▶ orders read ─▶ worker, jobs ─▶ ingress, admin ─▶ "listening"
stop    ingress refuses ─▶ requests under way are answered ─▶ worker drains and commits ─▶ log closed
"""

import asyncio
import gc
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.credentials import kafka_certificate_ends, security_of
from gateway.engine.jobs import Follower, Jobs
from gateway.engine.unread import Unread
from gateway.engine.unreadable import notes_of
from gateway.engine.worker import Worker
from gateway.ingress.ingress import Ingress
from gateway.log.base import Log, Partition, TopicSpec
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.kafka.log import CLIENT_ID, KafkaLog
from gateway.log.topics import Topics
from gateway.model import AddressUnavailableError, GatewayError, LogLostError, LogUnavailableError, UsageError
from gateway.ops.admin import admin_application, log_problem
from gateway.ops.tally import MOST_ROUTES, InForce, Tally
from gateway.rules.access import certificate_ends
from gateway.rules.load import InvalidRulesError, load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import Changes, Refusal, Stamp, Watch, changes
from gateway.settings import Address, EmbeddedTarget, KafkaTarget, Role, Settings
from gateway.telemetry.metrics import Metrics, process_registry

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

WATCH_EVERY = 1.0
"""Seconds between looks at the rule files. A SIGHUP looks at once, and takes them as they are."""
RELOAD_AGAIN = 5.0
"""Seconds until rules are looked at again that came while the log was away, or hadn't allowed a new source's topic."""
MAX_NAMES = 20
"""Of what a reload has changed, in each list of its log line."""
MAX_PROBLEMS = 5
"""Of refused rules that `/status` tells; the log line has all."""
REMEMBERED = 3600.0
"""Seconds for which `/status` tells that rules had been refused: who has fixed them wants to know since when."""
PING_EVERY = 0.5
"""Seconds between looks at the log: so late at most is told that it refuses senders."""
PING_TIMEOUT = 5.0
TELL_EVERY = 60.0
"""Seconds between two lines about a log that is still away."""
LAG_EVERY = 0.25
STOP_TIMEOUT = 25.0
"""Seconds from the signal to the end: Kubernetes kills at 30."""
ANSWER_TIMEOUT = 5.0
"""Seconds of it for requests under way: as long as an append may take."""
OPEN_FILES = 65_536
"""More than attempts, idle connections and senders together come to."""
SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread may keep the interpreter: one that loads rules delays each step of the loop by it."""
ADMIN_CLOSE_TIMEOUT = 1.0
"""Seconds for a scrape under way, beyond the drain: who asks for a page and doesn't read it holds no stop up."""
CLOSE_TIMEOUT = 6.0
"""Seconds of it for the last commit, and for letting go of a log that doesn't answer."""


async def open_log(settings: Settings, *, owner: bool) -> Log:
    """Open the log that the settings name. Raises UsageError, or LogUnavailableError when it doesn't answer."""
    if isinstance(settings.log, EmbeddedTarget):
        return await EmbeddedLog.open(settings.log.path, owner=owner)
    # The admin address is this process's alone: with the host it names its place, also for the next process there.
    place = f"gateway-{socket.gethostname()}-{settings.admin.port}" if owner and settings.admin.port else CLIENT_ID
    security = await security_of(settings.kafka)
    return await KafkaLog.open(",".join(settings.log.servers), client_id=place, security=security)


def cannot_listen(where: str, address: Address, error: OSError) -> AddressUnavailableError:
    """Say why a flag's address can't be listened at."""
    if isinstance(error, socket.gaierror):  # whose number isn't the system's
        expected, reason = "a host that has an address", error.strerror or "none"
    else:
        # asyncio's own words hold the address once more, as Python writes it.
        expected, reason = "an address that is free", os.strerror(error.errno or 0)
    return AddressUnavailableError(f"{where} {address}: expected {expected}, got {reason.lower()}")


def event_topics(rules: Rules, topics: Topics) -> set[str]:
    """Return the topics that the sources of the rules append to."""
    return {source.topic or topics.events(source.name) for source in rules.sources.values()}


def specs_of(rules: Rules, topics: Topics) -> tuple[TopicSpec, ...]:
    """Return what the topics have to be by these rules. Raises RulesError where events and ours would share one."""
    return topics.specs(event_topics(rules, topics), rules.ordered)


async def ensure_topics(log: Log, settings: Settings, rules: Rules, logger: FilteringBoundLogger) -> None:
    """Hold the topics against what the promises need; a fatal difference is a UsageError, or with `--dev` a warning."""
    specs = specs_of(rules, Topics(settings.topic_prefix))
    if settings.dev or isinstance(settings.log, EmbeddedTarget):
        for name in await log.create(specs):
            logger.info("topic_created", topic=name)
    fatal: list[str] = []
    for problem in await log.check(specs):
        if problem.is_fatal and not settings.dev:
            fatal.append(f"{problem.topic}: {problem.message}")
        else:
            logger.warning("topic_differs", topic=problem.topic, problem=problem.message)
    if fatal:
        advice = "run `gateway topics create` for what is missing, or use --dev where losing events doesn't matter"
        raise UsageError("\n".join([*fatal, advice]))


class Gateway:
    """One process. `run` until a signal (or `stop`)."""

    def __init__(self, settings: Settings, logger: FilteringBoundLogger) -> None:
        self._settings = settings
        self._logger = logger
        self._topics = Topics(settings.topic_prefix)
        self._registry = process_registry()
        self._metrics = Metrics(self._registry)
        self._version = version("webhook-gateway")  # from the disk
        self._metrics.build_info.labels(self._version, settings.role).set(1)
        self._stopping = asyncio.Event()
        self._reload = asyncio.Event()
        self._rules: Rules
        self._watched: set[Path]
        self._watch: Watch
        self._again = math.inf
        self._read_at = time.monotonic()
        self._unchanged_at: float | None = None
        self._in_force_since: float | None = None
        self._changed: tuple[str, ...] = ()
        self._changed_at = 0.0
        self._refusal: Refusal | None = None
        self._refusal_ended = 0.0
        self._refused_routes: Mapping[str, frozenset[str]] = {}
        self._tally = Tally(self._metrics.unrouted_events, self._metrics.let_go_events, remembered=REMEMBERED)
        self._is_ready = False
        self._ingress: Ingress | None = None
        self._worker: Worker | None = None
        self._client: Client | None = None
        self._traces: Traces | None = None
        self._lost: LogLostError | None = None

    def stop(self) -> None:
        """Let `run` end: gracefully, within 25 seconds."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises RulesError, UsageError, LogUnavailableError or AddressUnavailableError when it can't begin, LogLostError
        when the log was taken away.
        """
        settings = self._settings
        _raise_open_files()
        sys.setswitchinterval(SWITCH_INTERVAL)
        await self._load()
        for warning in self._rules.warnings:
            self._logger.warning("rules_warning", problem=warning)
        # What is written of a series is kept: with ten thousand routes the first page would take a second.
        b"".join(self._metrics.pieces(is_open=False))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        async with AsyncExitStack() as stack:
            self._traces = self._open_traces()
            if self._traces is not None:
                stack.push_async_callback(asyncio.to_thread, self._traces.close)
            log = await open_log(settings, owner=True)
            stack.push_async_callback(log.close)
            await ensure_topics(log, settings, self._rules, self._logger)
            self._metrics.log_up.set(1)
            if isinstance(settings.log, KafkaTarget):
                ends = await asyncio.to_thread(kafka_certificate_ends, settings.kafka)
                self._metrics.tell_certificates("kafka", ends)
            try:
                await self._serve(log, stack)
            except BaseExceptionGroup as group:
                known, unknown = group.split(GatewayError)
                if known is None or unknown is not None:
                    raise
                raise _first(known) from group
            if self._lost is not None:
                raise self._lost
        self._logger.info("stopped")

    async def _serve(self, log: Log, stack: AsyncExitStack) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as tasks:
            background: list[asyncio.Task[None]] = []
            worker_task: asyncio.Task[None] | None = None
            # First of all, since its address is this process's name in the groups: two of one name would throw each
            # other out.
            admin = await self._start_admin(log, stack)
            if settings.role is not Role.INGRESS:
                worker_task, others = await self._start_worker(log, tasks, stack)
                background += others
            listen = await self._start_ingress(log) if settings.role is not Role.ROUTER else None
            background.append(tasks.create_task(self._watch_rules(log), name="rules-watch"))
            background.append(tasks.create_task(self._watch_log(log), name="log-watch"))
            background.append(tasks.create_task(self._watch_loop(), name="loop-watch"))
            _spare_collector()
            self._is_ready = True
            self._logger.info(
                "listening",
                ingress=None if listen is None else f"http://{listen}",
                admin=f"http://{admin}",
                role=settings.role,
                routes=len(self._rules.routes),
            )
            await self._stopping.wait()
            self._logger.info("stopping")
            # Without a log nothing that ends could be committed, and no successor be written.
            until = time.monotonic() + (STOP_TIMEOUT - CLOSE_TIMEOUT if self._lost is None else 0.0)
            if self._ingress is not None:
                await self._ingress.stop(ANSWER_TIMEOUT)
            if self._worker is not None and worker_task is not None:
                self._worker.stop(max(1.0, until - time.monotonic()))
                await asyncio.wait([worker_task])
            for task in background:
                task.cancel()

    async def _start_worker(
        self, log: Log, tasks: asyncio.TaskGroup, stack: AsyncExitStack
    ) -> tuple[asyncio.Task[None], list[asyncio.Task[None]]]:
        follower = Follower(log, self._topics, self._metrics, self._logger)
        caught_up = asyncio.Event()
        follow = tasks.create_task(follower.follow(caught_up), name="control-follow")
        # Nothing is taken in before what operators have ordered is known, or a paused destination would be called.
        waiting = {tasks.create_task(caught_up.wait()), tasks.create_task(self._stopping.wait())}
        _, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        self._client = await stack.enter_async_context(Client(EgressGuard(self._rules.egress), clock=log.now))
        jobs = Jobs(
            log=log,
            topics=self._topics,
            rules=lambda: self._rules,
            follower=follower,
            metrics=self._metrics,
            logger=self._logger,
        )
        self._worker = Worker(
            log=log,
            topics=self._topics,
            rules=lambda: self._rules,
            client=self._client,
            control=follower.control,
            metrics=self._metrics,
            logger=self._logger,
            traces=self._traces,
            others=lambda: {**follower.unread(), **jobs.unread()},
        )
        worker = tasks.create_task(self._worker.run(), name="worker")
        return worker, [follow, tasks.create_task(jobs.run(), name="jobs")]

    async def _start_ingress(self, log: Log) -> Address:
        self._ingress = Ingress(
            rules=lambda: self._rules,
            log=log,
            topics=self._topics,
            metrics=self._metrics,
            logger=self._logger,
            traces=self._traces,
        )
        address = self._settings.listen
        try:
            # Several processes may share the port, but not where each would have a log of its own.
            is_shared = not isinstance(self._settings.log, EmbeddedTarget)
            return Address(*await self._ingress.start(*address, is_shared=is_shared))
        except OSError as error:
            raise cannot_listen("--listen", address, error) from error

    async def _start_admin(self, log: Log, stack: AsyncExitStack) -> Address:
        application = admin_application(
            registry=self._registry,
            metrics=self._metrics,
            log=log,
            unready=self._unready,
            unread=self._unread,
            notes=lambda: notes_of(self._metrics),
            status=lambda: self._status(log.now()),
        )
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=ADMIN_CLOSE_TIMEOUT)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        address = self._settings.admin
        site = web.TCPSite(runner, *address)
        try:
            await site.start()
        except OSError as error:
            raise cannot_listen("--admin", address, error) from error
        name = runner.addresses[0]
        return Address(name[0], name[1])

    def _open_traces(self) -> "Traces | None":
        settings = self._settings
        if settings.traces is None:
            return None
        try:
            from gateway.telemetry.traces import Traces  # noqa: PLC0415 - an extra, and half a second
        except ImportError as error:
            message = "expected the extra: pip install 'webhook-gateway[otel]'"
            raise UsageError(f"--traces: {message}, got no module {error.name}") from error
        return Traces(
            settings.traces,
            ratio=settings.traces_ratio,
            version=self._version,
            instance=f"{socket.gethostname()}:{settings.admin.port}",
            system="gateway" if isinstance(settings.log, EmbeddedTarget) else "kafka",
            metrics=self._metrics,
            logger=self._logger,
        )

    def _unready(self) -> str | None:
        if self._stopping.is_set():
            return "draining"
        return None if self._is_ready else "starting"

    def _unread(self) -> Mapping[Partition, Unread]:
        return {} if self._worker is None else self._worker.unread

    def _status(self, now: float) -> Mapping[str, Any]:
        """Tell what keeps deliveries back in this process."""
        metrics = self._metrics
        holds = {} if self._worker is None else self._worker.holds
        return {
            "version": self._version,
            "role": self._settings.role,
            "rules": {
                "file": str(self._settings.rules.absolute()),
                "refused": bool(metrics.rules_refused.value),
                "loaded_at": metrics.rules_loaded_timestamp.value,
                "since": self._in_force_since,
                "changed": self._changed,
                "changed_at": self._changed_at,
                "refusal": self._told_refusal(),
                "routes": len(self._rules.routes),
            },
            "holds": [
                {"destination": name, "why": hold.why, "after": hold.after, "since": hold.since, "until": hold.until}
                for name, hold in sorted(holds.items())
            ],
            "ordered": [
                {
                    "route": labels[0],
                    "destination": labels[1],
                    "halted": gauge.value,
                    "blocked": metrics.ordered_blocked_keys.labels(*labels).value,
                }
                for labels, gauge in sorted(metrics.ordered_halted_keys.items())
            ],
            "sources": [self._told_source(name, counts, now) for name, counts in sorted(self._counts().items())],
        }

    def _told_refusal(self) -> Mapping[str, Any] | None:
        """Return which rules are refused, or were a while ago."""
        refusal = self._refusal
        if refusal is None or (refusal.until is not None and time.monotonic() > self._refusal_ended + REMEMBERED):
            return None
        routes = self._refused_routes
        is_told = sum(map(len, routes.values())) <= MOST_ROUTES
        return {
            **asdict(refusal),
            "problems": refusal.problems[:MAX_PROBLEMS],
            "count": len(refusal.problems),
            "routes": {source: sorted(names) for source, names in routes.items()} if is_told else {},
        }

    def _told_source(self, name: str, counts: Mapping[str, float], now: float) -> Mapping[str, Any]:
        """Tell what was counted of a source since the rules for it have changed, or the process began."""
        told = self._tally.of(name, counts, at=time.monotonic())
        refused = {
            reason: {
                "count": run.count,
                "of": run.count + counts["events"] - run.events,
                "since": run.since,
                "last": run.last,
            }
            for reason, run in sorted(self._metrics.refused_requests.of(name, now).items())
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
            name: {what: family.labels(name).value for what, family in families.items()} for name in self._rules.sources
        }

    async def _load(self) -> None:
        """Read the first rules. What is written after that is a change, also while the log is still being opened."""
        self._read_at = time.monotonic()
        before = await asyncio.to_thread(_stamps, [self._settings.rules])
        rules = await asyncio.to_thread(load_rules, self._settings.rules)
        self._in_force(rules, await asyncio.to_thread(certificate_ends, rules))
        self._watch = Watch(await asyncio.to_thread(_stamps, self._watched) | before)

    def _in_force(self, rules: Rules, certificates: Mapping[str, float]) -> None:
        self._rules = rules
        self._watched = set(rules.files)
        self._metrics.prepare(rules)
        self._metrics.tell_certificates("destination", certificates)
        self._metrics.rules_loaded_timestamp.set(time.time())
        self._metrics.rules_refused.set(0)

    async def _watch_rules(self, log: Log) -> None:
        self._unchanged_at = log.now() - (time.monotonic() - self._read_at)
        while True:
            try:
                async with asyncio.timeout(WATCH_EVERY):
                    await self._reload.wait()
            except TimeoutError:
                pass
            await self._look(log, now=time.monotonic())

    async def _look(self, log: Log, *, now: float) -> None:
        """Look at the rule files, and read them if they are due, or if somebody has asked for it."""
        # Stamped before reading: a change while we read is seen at the next look.
        at = log.now()
        before = await asyncio.to_thread(_stamps, self._watched)
        is_due = self._watch.is_due(before)
        if self._watch.is_at_rest and not self._is_refused:
            self._unchanged_at = at
        if not (is_due or self._reload.is_set() or (now >= self._again and self._watch.is_at_rest)):
            return
        self._reload.clear()
        self._again = math.inf if await self._try_to_reload(log) else now + RELOAD_AGAIN
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
            self._watched = {*self._rules.files, *error.files}  # a file that was missing may come

    async def _try_to_reload(self, log: Log) -> bool:
        """Put the rules on disk in force, whole, or keep those that are.

        False where the log was in the way: it was away, or hadn't a topic that it needs and wouldn't let us make it.
        """
        try:
            rules = await asyncio.to_thread(load_rules, self._settings.rules)
            changed = await asyncio.to_thread(changes, self._rules, rules)
            certificates = await asyncio.to_thread(certificate_ends, rules)
            added = set(specs_of(rules, self._topics)).difference(specs_of(self._rules, self._topics))
            if added:
                # The topic of a new source or ordered route is made and checked before that is served: a client's
                # request for the metadata of one that is missing must not create it with the broker's defaults.
                await log.create(sorted(added, key=attrgetter("name")))
                await ensure_topics(log, self._settings, rules, self._logger)
        except GatewayError as error:
            await self._refuse(error, log)
            return not isinstance(error, LogUnavailableError | UsageError)
        refused_since = self._take(rules, certificates, changed, log.now())
        if self._client is not None:
            self._client.use_guard(EgressGuard(rules.egress))
        if self._worker is not None:
            self._worker.reload()
        _spare_collector()
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
        if changed.removed:  # meant, or a file that was cut where it is still valid
            self._logger.warning("rules_reloaded", **told)
        else:
            self._logger.info("rules_reloaded", **told)
        return True

    def _take(self, rules: Rules, certificates: Mapping[str, float], changed: Changes, now: float) -> float | None:
        """Put rules in force. Return since when others had been refused before, if they had."""
        since = None
        if self._refusal is not None and self._is_refused:
            since = self._refusal.since
            self._refusal, self._refusal_ended = replace(self._refusal, until=now), time.monotonic()
            self._refused_routes = {source: routes for source, routes in changed.touched.items() if routes}
        self._in_force(rules, certificates)
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
            self._tally.change(changed, self._counts(), in_force, now=now, at=time.monotonic())
            for kind, name in [text.partition(":")[0].split(" ", 1) for text in changed.changed if ":" in text]:
                if kind == "source":
                    self._metrics.refused_requests.forget(name)
        return since

    async def _watch_log(self, log: Log) -> None:
        """Tell that the log doesn't answer or refuses appends, once and each minute, and that it is back.

        Let `run` end where it was taken away.
        """
        since: float | None = None
        told_at = 0.0
        while True:
            await asyncio.sleep(PING_EVERY)
            problem = await log_problem(log, PING_TIMEOUT)
            now = time.monotonic()
            self._metrics.log_up.set(0 if problem else 1)
            if isinstance(problem, LogLostError):
                self._logger.error("log_lost", error=str(problem))
                self._lost = problem
                self.stop()
                return
            if problem is None:
                if since is not None:
                    self._logger.info("log_available", seconds=round(now - since, 1))
                since = None
            elif since is None or now >= told_at + TELL_EVERY:
                since = now if since is None else since
                told_at = now
                self._logger.warning("log_unavailable", error=str(problem))

    async def _watch_loop(self) -> None:
        """Measure by how much the event loop keeps what is due waiting."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self._metrics.event_loop_lag.observe(max(0.0, clock() - due))


def _raise_open_files() -> None:
    """Allow as many open files as the system lets us: each attempt and each sender is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _spare_collector() -> None:
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


def _first(group: BaseExceptionGroup[GatewayError]) -> GatewayError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
