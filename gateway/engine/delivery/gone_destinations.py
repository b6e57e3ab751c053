"""Pauses destinations that have responded with 410, where the rules say so (`on_gone: pause`)."""

from collections.abc import Callable, Coroutine
from http import HTTPStatus

from gateway.engine.control.records import ControlRecord
from gateway.engine.services import Services
from gateway.engine.successor_writer import SuccessorWriter


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

    def pause(self, destination: str) -> None:
        """Pause a destination, once."""

        async def write() -> None:
            at = self._services.log.now()
            command = ControlRecord(kind="pause", name=name, state="paused", at=at, by="a 410 response")
            self._services.logger.error("destination_paused", destination=destination, status=int(HTTPStatus.GONE))
            await self._successors.store_command(command)
            self._pausing.discard(name)

        name = f"destination/{destination}"
        if name not in self._pausing and self._services.control.paused_by("", destination) is None:
            self._pausing.add(name)
            self._spawn(write, "worker-pause")
