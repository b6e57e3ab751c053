"""The parent of several processes: binds the ports, starts the children, and ends them.

    start   bind ─▶ admin address ─▶ the first child ─ serves ─▶ the others ─ serve ─▶ "processes_started"
    a child ends by itself ─▶ "process_ended" ─ 0.5 s, doubled each time, up to 30 ─▶ started again
    stop    SIGTERM to all ─▶ each drains ─▶ the end of the last

The first child starts alone: what keeps all of them from starting (rules, topics, the log) is said once, with its exit
code. And topics that are missing are created by one of them.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from structlog.typing import FilteringBoundLogger

from gateway.ingress.listener import bind
from gateway.listen_errors import cannot_listen, listen_at
from gateway.model import UsageError
from gateway.open_files import raise_file_limit
from gateway.ops.admin import admin_runner
from gateway.processes.child import READY, Child, admin_of
from gateway.processes.front import Front
from gateway.processes.metrics_page import ProcessState
from gateway.processes.restarts import Restarts
from gateway.setting_values import MAX_PROCESSES
from gateway.settings import Address, Settings

STOP_TIMEOUT = 28.0
"""Seconds from the signal until a child that hasn't ended is killed: it has 25 by itself."""
ADMIN_CLOSE_TIMEOUT = 0.5


class _Kept:
    """A child that there should be, as it is now."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: asyncio.subprocess.Process | None = None
        self.serves = asyncio.Event()
        self.restarts = 0

    @property
    def state(self) -> ProcessState:
        pid = None if self.process is None else self.process.pid
        return ProcessState(number=self.child.number, pid=pid, is_ready=self.serves.is_set(), restarts=self.restarts)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


class Supervisor:
    """Runs `settings.processes` children until a signal."""

    def __init__(self, settings: Settings, logger: FilteringBoundLogger, *, folder: Path) -> None:
        self._settings = settings
        self._logger = logger
        self._folder = folder
        self._kept: list[_Kept] = []
        self._sockets: list[socket.socket] = []
        self._stopping = asyncio.Event()
        self._has_started = False
        self._code = 0

    def stop(self) -> None:
        """Make `run` end all children."""
        self._stopping.set()

    async def run(self) -> int:
        """Return the exit code: 0 after a signal, else that of the child that can't be kept.

        Raises AddressUnavailableError.
        """
        raise_file_limit()
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            stack.callback(self._close_sockets)
            by_address = await self._bind()
            self._kept = [_Kept(self._child(number, by_address)) for number in range(self._settings.processes)]
            admin = await self._start_admin(stack)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            loop.add_signal_handler(signal.SIGHUP, self._signal_all, signal.SIGHUP)
            keeping: list[asyncio.Task[None]] = []
            first, *others = self._kept
            async with asyncio.TaskGroup() as tasks:
                for each in ([first], others):
                    keeping += [tasks.create_task(self._keep(kept), name="keep") for kept in each]
                    await self._until_these_serve(each)
                if not self._stopping.is_set():
                    self._has_started = True
                    self._logger.info("processes_started", processes=len(self._kept), admin=f"http://{admin}")
                await self._stopping.wait()
                self._close_sockets()  # the last child that closes them takes what has connected by then
                self._signal_all(signal.SIGTERM)
                _, left = await asyncio.wait(keeping, timeout=STOP_TIMEOUT)
                if left:
                    self._logger.error("processes_killed", processes=len(left))
                    self._signal_all(signal.SIGKILL)
        return self._code

    async def _bind(self) -> list[list[socket.socket]]:
        if not self._settings.role.receives:
            return []
        address = self._settings.listen
        try:
            found = await bind(*address, is_shared=True, processes=self._settings.processes)
        except OSError as error:
            raise cannot_listen("--listen", address, error) from error
        self._sockets = [*chain(*found)]
        return found

    def _close_sockets(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets = []

    def _child(self, number: int, by_address: Sequence[Sequence[socket.socket]]) -> Child:
        own = [each[number % len(each)].fileno() for each in by_address]
        others = [each.fileno() for each in chain(*by_address) if each.fileno() not in own]
        return Child(number=number, folder=self._folder, own=own, others=others)

    async def _start_admin(self, stack: AsyncExitStack) -> Address:
        front = Front(self._folder, lambda: [each.state for each in self._kept])
        await stack.enter_async_context(front.open())
        # A listener of the live tail that has gone away ends what it was asked for.
        runner = admin_runner(front.application(), close_timeout=ADMIN_CLOSE_TIMEOUT, ends_with_client=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        return await listen_at(self._settings.admin, runner, where="--admin")

    def _signal_all(self, number: signal.Signals) -> None:
        for each in self._kept:
            each.signal(number)

    async def _until_these_serve(self, kept: Sequence[_Kept]) -> None:
        """Wait until all of them serve, or everything stops."""
        waiting = [asyncio.create_task(each.wait()) for each in (self._stopping, *[one.serves for one in kept])]
        stopping, *serving = waiting
        try:
            while serving and not stopping.done():
                await asyncio.wait({stopping, serving[0]}, return_when=asyncio.FIRST_COMPLETED)
                serving = [each for each in serving if not each.done()]
        finally:
            for each in waiting:
                each.cancel()

    async def _keep(self, kept: _Kept) -> None:
        """Start a child, again and again, until everything stops."""
        loop, restarts = asyncio.get_running_loop(), Restarts()
        while not self._stopping.is_set():
            began = loop.time()
            code = await self._run_one(kept)
            if self._stopping.is_set():
                self._code = self._code or _exit_code(code)
                return
            restarts = restarts.after(loop.time() - began)
            others_serve = any(each.serves.is_set() for each in self._kept)
            if not self._has_started or restarts.is_useless(others_serve=others_serve):
                self._code = _exit_code(code) or 1
                self.stop()
                return
            self._logger.error(
                "process_ended", process=kept.child.number, code=code, seconds_until_restart=restarts.wait
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(restarts.wait):
                    await self._stopping.wait()
            kept.restarts += 1

    async def _spawn(self, kept: _Kept) -> tuple[socket.socket, asyncio.subprocess.Process]:
        """Start a child; return our end of its standard input. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                ours.setblocking(False)  # noqa: FBT003 - positional in C
                kept.process = await asyncio.create_subprocess_exec(
                    *_command(),
                    stdin=theirs.fileno(),
                    pass_fds=(*kept.child.own, *kept.child.others),
                    env={**os.environ, **kept.child.variables()},
                )
            except BaseException:
                ours.close()
                raise
            return ours, kept.process

    async def _run_one(self, kept: _Kept) -> int:
        """Start a child, and return its exit code once it has ended: if a signal has killed it, that, negative."""
        try:
            await asyncio.to_thread(kept.child.admin.unlink, missing_ok=True)
            ours, process = await self._spawn(kept)
        except OSError as error:  # no memory, or too many processes
            self._logger.error("process_not_started", process=kept.child.number, error=str(error))
            return 1
        with ours:
            self._logger.info("process_started", process=kept.child.number, pid=process.pid)
            if self._stopping.is_set():  # meanwhile
                kept.signal(signal.SIGTERM)
            serving = asyncio.create_task(_note_ready(kept, ours), name="ready")
            try:
                return await process.wait()
            finally:
                serving.cancel()
                await asyncio.wait({serving})  # it reads what is closed now
                kept.process = None
                kept.serves.clear()


async def _note_ready(kept: _Kept, connection: socket.socket) -> None:
    with suppress(OSError):
        if await asyncio.get_running_loop().sock_recv(connection, len(READY)):
            kept.serves.set()


def _command() -> Sequence[str]:
    """Return this process's own command, as it was given to the interpreter."""
    return [sys.executable, *sys.orig_argv[1:]]


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def supervise(settings: Settings, logger: FilteringBoundLogger, folder: Path) -> int:
    """Run several processes, until a signal; return the exit code. `folder` is nobody else's."""
    return asyncio.run(Supervisor(settings, logger, folder=folder).run())


def private_folder() -> "TemporaryDirectory[str]":
    """Create a folder for sockets that nobody else may enter: in systemd's RUNTIME_DIRECTORY, or where others are.

    Raises UsageError if there can be none.
    """
    parent = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
    variable = "TMPDIR" if parent is None else "RUNTIME_DIRECTORY"
    try:
        folder = TemporaryDirectory(prefix="gateway-", dir=parent)
    except OSError as error:
        raise UsageError(
            f"--processes: expected a folder for temporary files, got {error.strerror}: set {variable}"
        ) from error
    try:
        with socket.socket(socket.AF_UNIX) as tried:  # the longest name that there may be
            tried.bind(str(admin_of(Path(folder.name), MAX_PROCESSES - 1)))
        admin_of(Path(folder.name), MAX_PROCESSES - 1).unlink()
    except OSError as error:
        folder.cleanup()
        expected = f"expected a folder for sockets, whose paths have about a hundred bytes, got {folder.name}"
        raise UsageError(f"--processes: {expected} ({error}): set {variable} to a shorter one") from error
    return folder
