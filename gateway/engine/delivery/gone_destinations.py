"""Pauses destinations that have responded with 410, where the rules say so (`on_gone: pause`)."""

from collections.abc import Callable, Coroutine
from http import HTTPStatus

from gateway.engine.control.records import ControlRecord
from gateway.engine.services import Services
from gateway.engine.successor_writer import SuccessorWriter
from gateway.rules.rules import Destination


class GoneDestinations:
    """Gives the command that an operator would. `spawn` runs its append, which a drain waits for."""

    def __init__(
        self,
        services: Services,
        successors: SuccessorWriter,
        spawn: Callable[[Callable[[], Coroutine[None, None, None]], str], None],
    ) -> None:
        self._services = services
        self._successors = successors
        self._spawn = spawn
        self._pausing: set[str] = set()

    def pause(self, destination: Destination) -> None:
        """Pause a destination, once, unless it gets another URL before that can be stored."""

        async def write() -> None:
            at = self._services.log.now()
            command = ControlRecord(kind="pause", name=name, state="paused", at=at, by="a 410 response")
            if await self._successors.store_command(command, is_wanted=is_wanted):
                self._services.logger.error(
                    "destination_paused", destination=destination.name, status=int(HTTPStatus.GONE)
                )
            self._pausing.discard(name)

        def is_wanted() -> bool:
            present = self._services.rules().destinations.get(destination.name)
            is_paused = self._services.control.paused_by("", destination.name) is not None
            return present is not None and present.url == destination.url and not is_paused

        name = f"destination/{destination.name}"
        if name not in self._pausing and is_wanted():
            self._pausing.add(name)
            self._spawn(write, "worker-pause")
