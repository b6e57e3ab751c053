"""`gateway run`: one process, from loading its rules to its last commit. One TaskGroup owns all of its tasks.

start   rules ─▶ log ─▶ topics checked ─▶ admin, index ─▶ control records read ─▶ worker, jobs ─▶ ingress ─▶ "listening"
        (senders wait for a log, or for the control records, for 5 s: then the ingress is first)
stop    ingress refuses ─▶ requests in progress finish ─▶ worker drains and commits ─▶ log closed
"""

import asyncio
import signal
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
from gateway.client.own_credentials import WithoutCredentials
from gateway.engine.control.follower import Follower
from gateway.engine.jobs.runner import Jobs
from gateway.engine.unavailable_partitions import Unread, name_of
from gateway.engine.undecodable_records import UndecodableRecords, newer_record_notices
from gateway.engine.worker import Worker
from gateway.index_keeper import IndexKeeper
from gateway.ingress.destination_responses import DestinationResponses
from gateway.ingress.ingress import Ingress
from gateway.ingress.listener import ConnectionSetup
from gateway.ingress.rate_share import RateShare
from gateway.ingress.tls import ServerTls, without_clients_names
from gateway.kafka_credentials import kafka_certificate_expiries
from gateway.listen_errors import cannot_listen, listen_at
from gateway.log.base import Log, Partition
from gateway.log.deferred import DeferredLog, comes, tried_until_open
from gateway.log.topics import Topics
from gateway.log_watch import LogWatch
from gateway.model import DISTRIBUTION, GatewayError, LogLostError, LogUnavailableError
from gateway.open_files import raise_file_limit
from gateway.open_log import log_to_open, open_log
from gateway.open_traces import open_traces
from gateway.ops.admin import admin_application, admin_runner
from gateway.ops.own_status import hold_statuses, ordered_statuses, unread_statuses
from gateway.processes.child import Child
from gateway.processes.peer import as_from_peer
from gateway.reload import Reloader
from gateway.required_topics import ensure_topics
from gateway.rules.rules import Rules
from gateway.settings import Address, EmbeddedTarget, KafkaTarget, Role, Settings, refuse_useless_spool
from gateway.spool.orphans import orphaned_files
from gateway.spool.spool import Spool, open_spool
from gateway.telemetry.logs import Lines
from gateway.telemetry.loop_lag import watch_loop
from gateway.telemetry.metrics import Metrics, process_registry

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

OPEN_TIMEOUT = 5.0
"""Seconds in which a log has to open at the start, or else the ingress begins with the spool; and in which the control
records have to be read, or else it begins before the deliveries."""
STOP_TIMEOUT = 25.0
"""Seconds from the signal to the end: Kubernetes kills at 30."""
INGRESS_STOP_TIMEOUT = 5.0
"""Seconds of it for requests in progress: as long as an append may take."""
SWITCH_INTERVAL = 0.0005  # Python's thread switch interval: so long a thread that loads rules delays the event loop.
ADMIN_CLOSE_TIMEOUT = 1.0
"""Seconds for a scrape in progress, after the drain: a client that doesn't read must not delay the stop."""
CLOSE_TIMEOUT = 6.0
"""Seconds of it for the last commit, and for closing a log that doesn't respond."""


class Gateway:
    """One process. `run` until a signal (or `stop`)."""

    def __init__(self, settings: Settings, logger: FilteringBoundLogger, child: Child | None = None) -> None:
        self._settings = settings
        self._child = child
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
        self._follower: Follower | None = None
        self._worker: Worker | None = None
        self._client: Client | None = None
        self._responses: DestinationResponses | None = None
        self._traces: Traces | None = None
        self._index: IndexKeeper | None = None
        self._access = Access(settings.access, refused=lambda why: self._metrics.access_refused.labels(why).inc())
        self._watch: LogWatch | None = None
        self._spool: Spool | None = None
        self._lost: LogLostError | None = None

    def count_dropped(self, lines: Lines) -> None:
        """Count the log lines that are dropped from now on."""
        lines.on_dropped = self._metrics.log_lines_dropped.inc

    def stop(self) -> None:
        """Make `run` stop gracefully, within 25 seconds."""
        self._stopping.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises RulesError, UsageError, LogUnavailableError or AddressUnavailableError if it can't start, LogLostError if
        the log was moved, replaced or damaged.
        """
        settings = self._settings
        refuse_useless_spool(settings)
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
            self._traces = open_traces(settings, self.reloader.type_of, self._version, self._metrics, self._logger)
            if self._traces is not None:
                stack.push_async_callback(asyncio.to_thread, self._traces.close)
            log = await self._open_log()
            stack.push_async_callback(log.close)
            if settings.role is not Role.CONSOLE and not isinstance(log, DeferredLog):
                await ensure_topics(log, settings, self.reloader.rules, self._logger, is_start=True)
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
        self._responses = DestinationResponses(
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
            worker_task: asyncio.Task[None] | None = None
            index_tasks: list[asyncio.Task[None]] = []
            # First of all, since its address is this process's name in the groups: two with the same name would evict
            # each other.
            admin = await self._start_admin(log, stack)
            background = self._start_watching(log, tasks)
            if self._settings.spool.file is not None:
                background.append(await self._start_spool(log, tasks, stack))
            if isinstance(log, DeferredLog) and not await self._open_in_time(log):
                background += await self._start_receiving(log, tasks, stack, admin)
                await tried_until_open(partial(self._open_once, log), self._stopping)
            if not self._is_ready or not self._stopping.is_set():
                index_tasks = await self._start_index(log, tasks)
                if settings.role.delivers:
                    # Nothing is read before the control records are known, or a paused destination would be called.
                    self._follower = Follower(log, self._topics, self._metrics, self._logger)
                    caught_up = asyncio.Event()
                    background.append(tasks.create_task(self._follower.follow(caught_up), name="control-follow"))
                    is_in_time = await comes(caught_up, self._stopping, timeout=OPEN_TIMEOUT)
                    if not is_in_time and settings.role.receives and not self._is_ready:
                        background += await self._start_receiving(log, tasks, stack, admin)
                    if await comes(caught_up, self._stopping):
                        worker_task, others = await self._start_worker(log, self._follower, tasks, stack)
                        background += others
            if not self._is_ready:
                background += await self._start_receiving(log, tasks, stack, admin)
            garbage.freeze()
            background.append(tasks.create_task(garbage.collect(), name="garbage"))
            await self._stopping.wait()
            self._logger.info("stopping")
            for task in index_tasks:
                task.cancel()  # its file is closed while the rest drains
            await self._drain(worker_task)
            for task in background:
                task.cancel()

    async def _drain(self, worker_task: asyncio.Task[None] | None) -> None:
        # Without a log, nothing could be committed and no successor written.
        until = time.monotonic() + (STOP_TIMEOUT - CLOSE_TIMEOUT if self._lost is None else 0.0)
        if self._ingress is not None:
            await self._ingress.stop(INGRESS_STOP_TIMEOUT)
        if self._worker is not None and worker_task is not None:
            self._worker.stop(max(1.0, until - time.monotonic()))
            await asyncio.wait([worker_task])

    def _start_watching(self, log: Log, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        watch = self._watch = LogWatch(
            log,
            topics=self._topics,
            rules=lambda: self.reloader.rules,
            metrics=self._metrics,
            logger=self._logger,
            on_lost=self._on_log_lost,
            found=self._unavailable,
        )
        started = [
            tasks.create_task(watch.watch_log(), name="log-watch"),
            tasks.create_task(watch.watch_partitions(), name="partitions-watch"),
            tasks.create_task(watch.watch_topics(), name="topics-watch"),
            tasks.create_task(watch_loop(self._metrics), name="loop-watch"),
            tasks.create_task(self._access.watch(), name="access-watch"),
        ]
        if self._tls is not None:
            started.append(tasks.create_task(self._tls.watch(), name="certificates-watch"))
        return started

    async def _start_receiving(
        self, log: Log, tasks: asyncio.TaskGroup, stack: AsyncExitStack, admin: Address | None
    ) -> list[asyncio.Task[None]]:
        """Start the ingress, if there is one, and watch the rules: from now on the process is ready."""
        listen, started = await self._start_ingress(log, tasks, stack) if self._settings.role.receives else (None, [])
        started.append(tasks.create_task(self.reloader.watch(log), name="rules-watch"))
        self._is_ready = True
        if self._child is not None:
            self._child.tell_ready()
        self._logger.info(
            "listening",
            ingress=None if listen is None else f"{'http' if self._tls is None else 'https'}://{listen}",
            admin=None if admin is None else f"http://{admin}",
            role=self._settings.role,
            routes=len(self.reloader.rules.routes),
        )
        return started

    async def _start_spool(self, log: Log, tasks: asyncio.TaskGroup, stack: AsyncExitStack) -> asyncio.Task[None]:
        topics, orphans = self.reloader.event_topics, await asyncio.to_thread(orphaned_files, self._settings)
        self._spool = await open_spool(
            self._settings.spool, log=log, topics=topics, metrics=self._metrics, logger=self._logger, orphans=orphans
        )
        stack.push_async_callback(self._spool.close)
        return tasks.create_task(self._spool.run(), name="spool")

    async def _open_log(self) -> Log:
        """Open the log or, with a spool, return it as it is: to be opened later."""
        settings = self._settings
        if settings.spool.file is not None:
            return log_to_open(settings)
        # A console reads beside the gateway that has the embedded log, and creates nothing.
        is_guest = settings.role is Role.CONSOLE
        log = await open_log(settings, owner=not (is_guest and isinstance(settings.log, EmbeddedTarget)))
        self._metrics.log_up.set(1)
        return log

    async def _open_in_time(self, log: DeferredLog) -> bool:
        """Open the log and look at its topics, unless that takes too long to let senders wait for it."""
        with suppress(TimeoutError, LogUnavailableError):
            async with asyncio.timeout(OPEN_TIMEOUT):
                await self._open_once(log)
                return True
        return False

    async def _open_once(self, log: DeferredLog) -> None:
        if not log.is_open:
            await log.open()
        await ensure_topics(log, self._settings, self.reloader.rules, self._logger, is_start=True)

    async def _start_worker(
        self, log: Log, follower: Follower, tasks: asyncio.TaskGroup, stack: AsyncExitStack
    ) -> tuple[asyncio.Task[None], list[asyncio.Task[None]]]:
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
                **self._unreadable(),
                **({} if self._watch is None else self._watch.missing),
            },
            refusing=lambda: {} if self._watch is None else self._watch.refusing,
        )
        return tasks.create_task(self._worker.run(), name="worker"), [tasks.create_task(jobs.run(), name="jobs")]

    async def _open_client(self, log: Log, stack: AsyncExitStack) -> Client:
        """Return the process's client, opened when it is first needed."""
        if self._client is None:
            senders = self._responses and WithoutCredentials(self._responses, lambda: self.reloader.rules)
            client = Client(EgressGuard(self.reloader.rules.egress), clock=log.now, senders=senders)
            self._client = await stack.enter_async_context(client)
        return self._client

    async def _start_ingress(
        self, log: Log, tasks: asyncio.TaskGroup, stack: AsyncExitStack
    ) -> tuple[Address, list[asyncio.Task[None]]]:
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
            append=None if self._spool is None else self._spool.append,
        )
        address, proxies = self._settings.listen, self._settings.connections.proxies
        sockets = None if self._child is None else self._child.sockets()
        setup = ConnectionSetup(tls=self._tls, proxies=proxies, sockets=sockets, tasks=tasks)
        if self._tls is not None:
            self._tls.trust(self.reloader.rules.client_authorities)
        try:
            # Several processes may share the port, unless each has its own log.
            is_shared = not isinstance(self._settings.log, EmbeddedTarget)
            listen = Address(*await self._ingress.start(*address, is_shared=is_shared, setup=setup))
        except OSError as error:
            raise cannot_listen("--listen", address, error) from error
        started = [tasks.create_task(self._ingress.quarantine.run(), name="quarantine")]
        if is_shared:
            share = RateShare(
                log=log,
                topics=self._topics,
                is_needed=lambda: any(source.limits.rate for source in self.reloader.rules.sources.values()),
                use=self._ingress.share_rates,
                logger=self._logger,
            )
            started.append(tasks.create_task(share.run(), name="rate-share"))
        if self._responses is not None:
            started.append(tasks.create_task(self._responses.follow(), name="responses-follow"))
        return listen, started

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
            event_topics=self.reloader.event_topics,
        )
        await self._index.open()
        return [tasks.create_task(self._index.run(), name="index")]

    async def _start_admin(self, log: Log, stack: AsyncExitStack) -> Address | None:
        """Return its address; None if it is asked through a parent's."""
        settings, child = self._settings, self._child
        application = admin_application(
            registry=self._registry,
            metrics=self._metrics,
            log=log,
            unready=self._unready,
            unread=self._unread,
            notes=self._notes,
            spools=lambda: self._spool is not None and self._spool.takes_events,
            status=lambda: self._status(log.now()),
            tokens=lambda: {} if self._ingress is None else self._ingress.tokens.all(),
            middlewares=() if child is None else (as_from_peer,),
        )
        if settings.serves_api:
            await self._add_api(application, log, stack)
        runner = admin_runner(application, close_timeout=ADMIN_CLOSE_TIMEOUT)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        if child is not None:
            await web.UnixSite(runner, child.admin).start()
            return None
        return await listen_at(settings.admin, runner, where="--admin")

    async def _add_api(self, application: web.Application, log: Log, stack: AsyncExitStack) -> None:
        from gateway.api.backend import Backend, of_settings  # noqa: PLC0415 - an ingress or a router alone has no use for it
        from gateway.console.serving import add_api_and_console  # noqa: PLC0415 - as above, with its templates

        backend = Backend(
            log=log,
            topics=self._topics,
            rules=lambda: self.reloader.rules,
            rules_status=self.reloader.status,
            index=lambda: None if self._index is None else self._index.index,
            index_problem=lambda: "" if self._index is None else self._index.problem,
            holds=lambda: {} if self._worker is None else self._worker.holds,
            spool=lambda: None if self._spool is None else self._spool.status_by_topic(),
            status=lambda: self._status(log.now()),
            **of_settings(self._settings),
        )
        opens, metrics = partial(self._open_client, log, stack), self._metrics
        await add_api_and_console(application, backend, self._access, self._logger, open_client=opens, metrics=metrics)

    def _on_rules_activated(self, rules: Rules) -> None:
        """Apply new rules to the client, the ingress and the worker."""
        if self._tls is not None:
            self._tls.trust(rules.client_authorities)
        if self._client is not None:
            self._client.set_guard(EgressGuard(rules.egress))
            self._client.retain_only(rules.destinations.values())
        if self._worker is not None:
            self._worker.reload()

    def _unready(self) -> str | None:
        if self._stopping.is_set():
            return "draining"
        if self._is_ready:
            return None
        unread = self._unavailable()
        reasons = [f"{partition.topic}/{name_of(partition)}: {reason}" for partition, reason in sorted(unread.items())]
        return "; ".join(["starting", *reasons])

    def _notes(self) -> Sequence[str]:
        noting = [each for each in (self._index, self._access, self._spool) if each is not None]
        return [*newer_record_notices(self._metrics), *[note for each in noting for note in each.notes()]]

    def _unread(self) -> Mapping[Partition, Unread]:
        if self._worker is not None:
            return self._worker.unread
        return {} if self._watch is None else self._watch.unread

    def _status(self, now: float) -> Mapping[str, Any]:
        """Return this process's status for `/status`."""
        problem = None if self._watch is None else self._watch.problem
        return {
            "version": self._version,
            "role": self._settings.role,
            "process": self._settings.process,
            "log_names": self._settings.log_names,
            "log": None if problem is None else dict(zip(("since", "reason"), problem, strict=True)),
            "spool": None if self._spool is None else self._spool.status(),
            "rules": self.reloader.status(),
            "certificates": None if self._tls is None else self._tls.status(time.time()),
            "holds": hold_statuses({} if self._worker is None else self._worker.holds),
            "ordered": ordered_statuses({} if self._worker is None else self._worker.ordered_states),
            "sources": self.reloader.source_statuses(now),
            "quiet_routes": None if self._worker is None else self.reloader.route_statuses(),
            "index": None if self._index is None else self._index.status(now),
            "unread": unread_statuses(self._unread()),
        }

    def _unreadable(self) -> Mapping[Partition, str]:
        return {} if self._responses is None else self._responses.unreadable()

    def _unavailable(self) -> Mapping[Partition, str]:
        """Return what can't be read or appended to, where no worker tells it; before there is one, what it awaits."""
        if self._worker is None and self._follower is not None:
            return self._follower.unreadable()
        if self._watch is None or self._settings.role.delivers:
            return {}
        return {**self._watch.refusing, **self._unreadable(), **self._watch.missing}

    def _on_log_lost(self, error: LogLostError) -> None:
        self._lost = error
        self.stop()


def _first_error(group: BaseExceptionGroup[GatewayError]) -> GatewayError:
    for error in group.exceptions:
        return _first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
