"""`gateway run`: one process, from loading its rules to its last commit. One TaskGroup owns all of its tasks.

start   rules ─▶ log ─▶ topics checked ─▶ admin, index ─▶ control records read ─▶ worker, jobs ─▶ ingress ─▶ "listening"
stop    ingress refuses ─▶ requests in progress finish ─▶ worker drains and commits ─▶ log closed
"""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway import garbage
from gateway.access.access import Access
from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.engine.control.follower import Follower
from gateway.engine.jobs.runner import Jobs
from gateway.engine.unavailable_partitions import Unread, UnreadPartitions, still_unread
from gateway.engine.undecodable_records import UndecodableRecords, newer_record_notices
from gateway.engine.worker import POLL_INTERVAL, Worker
from gateway.index_keeper import IndexKeeper
from gateway.ingress.destination_responses import DestinationResponses
from gateway.ingress.ingress import Ingress
from gateway.ingress.listener import ConnectionSetup
from gateway.ingress.rate_share import RateShare
from gateway.ingress.tls import ServerTls, without_clients_names
from gateway.kafka_credentials import kafka_certificate_expiries
from gateway.listen_errors import cannot_listen
from gateway.log.base import Log, Partition
from gateway.log.topics import Topics
from gateway.model import (
    DISTRIBUTION,
    GatewayError,
    LogLostError,
    LogUnavailableError,
    UsageError,
)
from gateway.open_files import raise_file_limit
from gateway.open_log import open_log
from gateway.ops.admin import admin_application, admin_runner, log_problem
from gateway.ops.process_status import route_status
from gateway.reload import Reloader
from gateway.required_topics import ensure_topics, missing_topics, specs_of
from gateway.rules.rules import Rules
from gateway.settings import Address, EmbeddedTarget, KafkaTarget, Role, Settings
from gateway.telemetry.metrics import Metrics, process_registry

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

PING_INTERVAL = 0.5
"""Seconds between checks of the log, and so the maximum delay until its refusals are reported."""
PING_TIMEOUT = 5.0
LOG_INTERVAL = 60.0
"""Seconds between log lines while the log is unavailable."""
TOPICS_INTERVAL = 5.0
"""Seconds between checks for missing topics."""
LAG_INTERVAL = 0.25
STOP_TIMEOUT = 25.0
"""Seconds from the signal to the end: Kubernetes kills at 30."""
INGRESS_STOP_TIMEOUT = 5.0
"""Seconds of it for requests in progress: as long as an append may take."""
SWITCH_INTERVAL = 0.0005
"""Python's thread switch interval: a thread that loads rules delays each step of the event loop by this much."""
ADMIN_CLOSE_TIMEOUT = 1.0
"""Seconds for a scrape in progress, after the drain: a client that doesn't read must not delay the stop."""
CLOSE_TIMEOUT = 6.0
"""Seconds of it for the last commit, and for closing a log that doesn't respond."""


class Gateway:
    """One process. `run` until a signal (or `stop`)."""

    def __init__(self, settings: Settings, logger: FilteringBoundLogger) -> None:
        self._settings = settings
        self._logger = logger
        self._topics = Topics(settings.topic_prefix)
        self._registry = process_registry()
        self._metrics = Metrics(self._registry)
        self._version = version(DISTRIBUTION)  # from the disk
        self._metrics.build_info.labels(self._version, settings.role).set(1)
        self._stopping = asyncio.Event()
        self.reloader = Reloader(settings, self._metrics, logger, on_activated=self._on_rules_activated)
        self._is_ready = False
        self._ingress: Ingress | None = None
        self._tls: ServerTls | None = None
        self._worker: Worker | None = None
        self._client: Client | None = None
        self._responses: DestinationResponses | None = None
        self._traces: Traces | None = None
        self._index: IndexKeeper | None = None
        self._access = Access(settings.access, refused=lambda why: self._metrics.access_refused.labels(why).inc())
        self._lost: LogLostError | None = None
        self._refusing: Mapping[Partition, str] = {}
        self._missing: Mapping[Partition, str] = {}
        self._unread_here = UnreadPartitions(self._metrics, logger)  # used without a worker
        # Since when, by its clock, the log doesn't respond or refuses appends, and why.
        self._log_problem: tuple[float, str] | None = None

    def stop(self) -> None:
        """Make `run` stop gracefully, within 25 seconds."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises RulesError, UsageError, LogUnavailableError or AddressUnavailableError if it can't start, LogLostError if
        the log was moved, replaced or damaged.
        """
        settings = self._settings
        raise_file_limit()
        sys.setswitchinterval(SWITCH_INTERVAL)
        await self.reloader.load()
        if settings.role.receives and settings.connections.certificates:
            self._tls = ServerTls(settings.connections.certificates, metrics=self._metrics, logger=self._logger)
            await self._tls.load()
            sys.unraisablehook = without_clients_names(sys.unraisablehook)
        await asyncio.to_thread(self._access.load)
        self.reloader.warn()
        # Caches each series' text: with ten thousand routes the first scrape would take a second.
        b"".join(self._metrics.pieces(is_open=False))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reloader.reload_requested.set)
        async with AsyncExitStack() as stack:
            self._traces = self._open_traces()
            if self._traces is not None:
                stack.push_async_callback(asyncio.to_thread, self._traces.close)
            # A console reads beside the gateway that has the embedded log, and creates nothing.
            is_guest = settings.role is Role.CONSOLE
            log = await open_log(settings, owner=not (is_guest and isinstance(settings.log, EmbeddedTarget)))
            stack.push_async_callback(log.close)
            if not is_guest:
                await ensure_topics(log, settings, self.reloader.rules, self._logger, is_start=True)
            self._metrics.log_up.set(1)
            if isinstance(settings.log, KafkaTarget):
                expiries = await asyncio.to_thread(kafka_certificate_expiries, settings.kafka)
                self._metrics.set_certificate_expiries("kafka", expiries)
            try:
                await self._serve(log, stack)
            except BaseExceptionGroup as group:
                known, unknown = group.split(GatewayError)
                if known is None or unknown is not None:
                    raise
                raise _first_error(known) from group
            if self._lost is not None:
                raise self._lost
        self._logger.info("stopped")

    async def _serve(self, log: Log, stack: AsyncExitStack) -> None:
        settings = self._settings
        self._responses = responses = DestinationResponses(
            rules=lambda: self.reloader.rules,
            log=log,
            topics=self._topics,
            undecodable=UndecodableRecords(
                topics=self._topics, metrics=self._metrics, logger=self._logger, now=log.now
            ),
            logger=self._logger,
            is_shared=not isinstance(settings.log, EmbeddedTarget),
        )
        async with asyncio.TaskGroup() as tasks:
            background: list[asyncio.Task[None]] = []
            worker_task: asyncio.Task[None] | None = None
            # First of all, since its address is this process's name in the groups: two with the same name would evict
            # each other.
            admin = await self._start_admin(log, stack)
            index_tasks = await self._start_index(log, tasks)
            if settings.role.delivers:
                worker_task, others = await self._start_worker(log, tasks, stack)
                background += others
            listen = await self._start_ingress(log, tasks, stack) if settings.role.receives else None
            if self._ingress is not None:
                background.append(tasks.create_task(self._ingress.quarantine.run(), name="quarantine"))
            if self._ingress is not None and not isinstance(settings.log, EmbeddedTarget):
                share = RateShare(
                    log=log,
                    topics=self._topics,
                    is_needed=lambda: any(source.limits.rate for source in self.reloader.rules.sources.values()),
                    use=self._ingress.share_rates,
                    logger=self._logger,
                )
                background.append(tasks.create_task(share.run(), name="rate-share"))
            if settings.role.receives:
                background.append(tasks.create_task(responses.follow(), name="responses-follow"))
            background.append(tasks.create_task(self.reloader.watch(log), name="rules-watch"))
            background.append(tasks.create_task(self._watch_log(log), name="log-watch"))
            background.append(tasks.create_task(self._watch_partitions(log), name="partitions-watch"))
            background.append(tasks.create_task(self._watch_topics(log), name="topics-watch"))
            background.append(tasks.create_task(self._watch_loop(), name="loop-watch"))
            background.append(tasks.create_task(self._access.watch(), name="access-watch"))
            if self._tls is not None:
                background.append(tasks.create_task(self._tls.watch(), name="certificates-watch"))
            garbage.freeze()
            background.append(tasks.create_task(garbage.collect(), name="garbage"))
            self._is_ready = True
            self._logger.info(
                "listening",
                ingress=None if listen is None else f"{'http' if self._tls is None else 'https'}://{listen}",
                admin=f"http://{admin}",
                role=settings.role,
                routes=len(self.reloader.rules.routes),
            )
            await self._stopping.wait()
            self._logger.info("stopping")
            for task in index_tasks:
                task.cancel()  # its file is closed while the rest drains
            # Without a log, nothing could be committed and no successor written.
            until = time.monotonic() + (STOP_TIMEOUT - CLOSE_TIMEOUT if self._lost is None else 0.0)
            if self._ingress is not None:
                await self._ingress.stop(INGRESS_STOP_TIMEOUT)
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
        # Nothing is read before the control records are known, or a paused destination would be called.
        waiting = {tasks.create_task(caught_up.wait()), tasks.create_task(self._stopping.wait())}
        _, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        client = await self._open_client(log, stack)
        jobs = Jobs(
            log=log,
            topics=self._topics,
            rules=lambda: self.reloader.rules,
            follower=follower,
            metrics=self._metrics,
            logger=self._logger,
        )
        self._worker = Worker(
            log=log,
            topics=self._topics,
            rules=lambda: self.reloader.rules,
            client=client,
            control=follower.control,
            metrics=self._metrics,
            logger=self._logger,
            traces=self._traces,
            attempts=self._settings.attempts,
            others=lambda: {
                **follower.unreadable(),
                **jobs.unreadable(),
                **self._unreadable_responses(),
                **self._missing,
            },
            refusing=lambda: self._refusing,
        )
        worker = tasks.create_task(self._worker.run(), name="worker")
        return worker, [follow, tasks.create_task(jobs.run(), name="jobs")]

    async def _open_client(self, log: Log, stack: AsyncExitStack) -> Client:
        """Return the process's client, opened when it is first needed."""
        if self._client is None:
            client = Client(EgressGuard(self.reloader.rules.egress), clock=log.now, senders=self._responses)
            self._client = await stack.enter_async_context(client)
        return self._client

    async def _start_ingress(self, log: Log, tasks: asyncio.TaskGroup, stack: AsyncExitStack) -> Address:
        async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
            client = await self._open_client(log, stack)
            return await client.fetch(url, timeout=timeout, limit=limit, request_body=request_body)

        self._ingress = Ingress(
            rules=lambda: self.reloader.rules,
            log=log,
            topics=self._topics,
            metrics=self._metrics,
            logger=self._logger,
            traces=self._traces,
            fetch=fetch,
            responses=self._responses,
        )
        address, proxies = self._settings.listen, self._settings.connections.proxies
        setup = ConnectionSetup(tls=self._tls, proxies=proxies, tasks=tasks)
        if self._tls is not None:
            self._tls.trust(self.reloader.rules.client_authorities)
        try:
            # Several processes may share the port, unless each has its own log.
            is_shared = not isinstance(self._settings.log, EmbeddedTarget)
            return Address(*await self._ingress.start(*address, is_shared=is_shared, setup=setup))
        except OSError as error:
            raise cannot_listen("--listen", address, error) from error

    async def _start_index(self, log: Log, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        if not self._settings.keeps_index:
            return []
        self._index = IndexKeeper(
            self._settings.index,
            log=log,
            topics=self._topics,
            metrics=self._metrics,
            logger=self._logger,
            is_needed=self._settings.role is Role.CONSOLE,
            redactions=lambda: self.reloader.rules.redactions,
        )
        await self._index.open()
        return [tasks.create_task(self._index.run(), name="index")]

    async def _start_admin(self, log: Log, stack: AsyncExitStack) -> Address:
        settings = self._settings
        application = admin_application(
            registry=self._registry,
            metrics=self._metrics,
            log=log,
            unready=self._unready,
            unread=self._unread,
            notes=self._notes,
            status=lambda: self._status(log.now()),
            tokens=lambda: {} if self._ingress is None else self._ingress.tokens.all(),
        )
        if settings.serves_api:
            await self._add_api(application, log, stack)
        runner = admin_runner(application, close_timeout=ADMIN_CLOSE_TIMEOUT)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        address = settings.admin
        site = web.TCPSite(runner, *address)
        try:
            await site.start()
        except OSError as error:
            raise cannot_listen("--admin", address, error) from error
        name = runner.addresses[0]
        return Address(name[0], name[1])

    async def _add_api(self, application: web.Application, log: Log, stack: AsyncExitStack) -> None:
        from gateway.access.identity_provider import IdentityProvider  # noqa: PLC0415 - as below
        from gateway.api.backend import Backend  # noqa: PLC0415 - an ingress or a router alone has no use for it
        from gateway.console.serving import add_api_and_console  # noqa: PLC0415 - as above, with its templates

        backend = Backend(
            log=log,
            topics=self._topics,
            rules=lambda: self.reloader.rules,
            rules_status=self.reloader.status,
            index=lambda: None if self._index is None else self._index.index,
            index_problem=lambda: "" if self._index is None else self._index.problem,
            holds=lambda: {} if self._worker is None else self._worker.holds,
        )
        provider, metrics = IdentityProvider(partial(self._open_client, log, stack), clock=time.time), self._metrics
        serve = partial(add_api_and_console, provider=provider, metrics=metrics)
        await serve(application, backend, self._access, self._logger)

    def _open_traces(self) -> "Traces | None":
        settings = self._settings
        if settings.traces is None:
            return None
        try:
            from gateway.telemetry.traces import Traces  # noqa: PLC0415 - an extra, and half a second
        except ImportError as error:
            message = f"expected the extra: pip install '{DISTRIBUTION}[otel]'"
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

    def _on_rules_activated(self, rules: Rules) -> None:
        """Apply new rules to the client, the ingress and the worker."""
        if self._tls is not None:
            self._tls.trust(rules.client_authorities)
        if self._client is not None:
            self._client.set_guard(EgressGuard(rules.egress))
            self._client.keep(rules.destinations.values())
        if self._worker is not None:
            self._worker.reload()

    def _unready(self) -> str | None:
        if self._stopping.is_set():
            return "draining"
        return None if self._is_ready else "starting"

    def _notes(self) -> Sequence[str]:
        of_index = () if self._index is None else self._index.notes()
        return [*newer_record_notices(self._metrics), *of_index, *self._access.notes()]

    def _unread(self) -> Mapping[Partition, Unread]:
        return self._unread_here.partitions if self._worker is None else self._worker.unread

    def _status(self, now: float) -> Mapping[str, Any]:
        """Return this process's status for `/status`."""
        holds = {} if self._worker is None else self._worker.holds
        ordered = {} if self._worker is None else self._worker.ordered_states
        return {
            "version": self._version,
            "role": self._settings.role,
            "log_names": self._settings.log_names,
            "log": None
            if self._log_problem is None
            else dict(zip(("since", "reason"), self._log_problem, strict=True)),
            "rules": self.reloader.status(),
            "certificates": None if self._tls is None else self._tls.status(time.time()),
            "holds": [
                {
                    "destination": name,
                    "why": hold.reason,
                    "after": hold.last_failure,
                    "since": hold.since,
                    "until": None if hold.is_probe_due else hold.until,
                    "untried_since": hold.untried_since,
                }
                for name, hold in sorted(holds.items())
            ],
            "ordered": [
                {"route": route, "destination": destination, **route_status(state)}
                for (route, destination), state in sorted(ordered.items())
            ],
            "sources": self.reloader.source_statuses(now),
            "quiet_routes": None if self._worker is None else self.reloader.route_statuses(),
            "index": None if self._index is None else self._index.status(now),
        }

    async def _watch_log(self, log: Log) -> None:
        """Log that the log doesn't respond or refuses appends, at first and every minute, and that it is back.

        Stop the process if it was moved, replaced or damaged.
        """
        since: float | None = None
        logged_at = 0.0
        while True:
            await asyncio.sleep(PING_INTERVAL)
            problem = await log_problem(log, PING_TIMEOUT)
            now = time.monotonic()
            self._metrics.log_up.set(0 if problem else 1)
            if isinstance(problem, LogLostError):
                self._logger.error("log_lost", error=str(problem))
                self._lost = problem
                self.stop()
                return
            began = log.now() if self._log_problem is None else self._log_problem[0]
            self._log_problem = None if problem is None else (began, str(problem))
            if problem is None:
                if since is not None:
                    self._logger.info("log_available", seconds=round(now - since, 1))
                since = None
            elif since is None or now >= logged_at + LOG_INTERVAL:
                since = now if since is None else since
                logged_at = now
                self._logger.warning("log_unavailable", error=str(problem))

    async def _watch_partitions(self, log: Log) -> None:
        """Watch which partitions refuse appends while others accept them."""
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            with suppress(LogUnavailableError):
                refusing = await log.refusing()
                # What attempts aren't recorded for has a metric and an alert of its own, and wakes nobody.
                self._refusing = {each: why for each, why in refusing.items() if each.topic != self._topics.attempts}
            if self._worker is None:
                now = log.now()
                found = {**self._refusing, **self._unreadable_responses(), **self._missing}
                self._unread_here.update(still_unread(self._unread_here.partitions, found, now), now)

    def _unreadable_responses(self) -> Mapping[Partition, str]:
        return {} if self._responses is None else self._responses.unreadable()

    async def _watch_topics(self, log: Log) -> None:
        """See which topics are missing that the rules need, also those that nobody reads or appends to just now."""
        while True:
            with suppress(LogUnavailableError, UsageError):
                specs = specs_of(self.reloader.rules, self._topics)
                self._missing = await missing_topics(log, [spec for spec in specs if not spec.is_best_effort])
            await asyncio.sleep(TOPICS_INTERVAL)

    async def _watch_loop(self) -> None:
        """Measure how late the event loop runs timers."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._metrics.event_loop_lag.observe(max(0.0, clock() - due))


def _first_error(group: BaseExceptionGroup[GatewayError]) -> GatewayError:
    for error in group.exceptions:
        return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
