"""What is told of the commands that a CLI command has stored, if it ends before it can say what came of them.

A stored command is carried out, also if the CLI command ends: an error or a Ctrl-C afterwards must not read as if
nothing was done.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway.model import GatewayError
from gateway.ops.output import Output

T = TypeVar("T")


class OutcomeUnknownError(GatewayError):
    """The log or the API is at fault, after a command was stored: what has come of it isn't known."""


@dataclass(frozen=True, slots=True)
class StoredCommands:
    """What one CLI command has stored: commands, each with what shows what came of it."""

    _lines: dict[str, str] = field(default_factory=dict)

    def add(self, command: str, see: str) -> None:
        """Note that a command is stored, such as "replay 18c2": `see` says what shows more of it."""
        self._lines[command] = f"{command} is stored, and is carried out all the same; {see}"

    def add_replay(self, name: str) -> None:
        """Note that a replay is stored, unless that is noted."""
        self.add(f"replay {name}", f"`gateway replay --follow {name}` shows its progress, --cancel {name} ends it")

    def add_redelivery(self, name: str) -> None:
        """Note that a redelivery is stored."""
        see = f"`gateway events redeliver --follow {name}` shows its result, --cancel {name} ends it"
        self.add(f"redelivery {name}", see)

    def add_cancellation(self, command: str) -> None:
        """Note that the cancellation of a command is stored."""
        self._lines[command] = f"the cancellation of {command} is stored, and takes effect all the same"

    @property
    def text(self) -> str:
        return "\n".join(self._lines.values())


async def to_its_end(output: Output, placing: Coroutine[Any, Any, T]) -> T:
    """Return once a command is stored, also if this is cancelled meanwhile: then it is known whether it is.

    The cancellation follows at the next wait, before another command is stored. A second one doesn't wait.
    """
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        placing.close()
        raise
    task = asyncio.create_task(placing, name="command")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        output.note("waiting until it is known whether the command is stored; Ctrl-C again doesn't wait")
        placed = await task
        if (this := asyncio.current_task()) is not None:
            this.uncancel()
            this.cancel()
        return placed


@contextmanager
def naming_stored(output: Output) -> Iterator[StoredCommands]:
    """Name the commands that were stored by then, if the block ends with an error or a cancellation.

    Raises OutcomeUnknownError for any error after the first one is stored.
    """
    stored = StoredCommands()
    try:
        yield stored
    except asyncio.CancelledError:
        if stored.text:
            output.note(stored.text, style="yellow")
        raise
    except (GatewayError, OSError) as error:
        if not stored.text:
            raise
        raise OutcomeUnknownError(f"{error}\n{stored.text}") from error
