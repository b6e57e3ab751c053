"""What one of several processes knows of its parent, which tells it in its environment and at its standard input."""

import os
import socket
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree

import orjson

from gateway.ingress.listener import Sockets
from gateway.model import UsageError
from gateway.settings import Settings

VARIABLE = "GATEWAY_CHILD"
READY = b"ready"
_STANDARD_INPUT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One of several processes: its number, from 0 on, and what its parent has for it.

    `folder` is the parent's, and nobody else's. `own` and `others` are descriptors of sockets at the port for senders.
    """

    number: int
    folder: Path
    own: Sequence[int] = ()
    others: Sequence[int] = ()

    @property
    def admin(self) -> Path:
        """The unix socket at which the parent asks it."""
        return admin_of(self.folder, self.number)

    @property
    def lines(self) -> Path:
        """The file that a process locks while it writes lines to the common output."""
        return lines_of(self.folder)

    def variables(self) -> Mapping[str, str]:
        """Return what its environment has of it."""
        fields = {"number": self.number, "folder": str(self.folder), "own": self.own, "others": self.others}
        return {VARIABLE: orjson.dumps(fields).decode()}

    def settings(self, settings: Settings) -> Settings:
        """Return its settings, of those of all."""
        return replace(settings, process=self.number, spool=settings.spool.of_process(self.number))

    def sockets(self) -> Sockets | None:
        """Return the sockets for senders, if it has any. Call it once: they are closed with what is returned."""
        if not self.own:
            return None
        own, others = ([socket.socket(fileno=each) for each in given] for given in (self.own, self.others))
        return Sockets(own=own, others=others)

    def tell_ready(self) -> None:
        """Tell the parent that this process serves."""
        with suppress(OSError):  # it has ended, and so will this process
            os.write(_STANDARD_INPUT, READY)

    def end_with_parent(self) -> None:
        """From now on, end at once when the parent has ended, however it did: an orphan must not deliver."""
        threading.Thread(target=_end_with_parent, args=(self.folder,), name="parent-watch", daemon=True).start()


def _end_with_parent(folder: Path) -> None:
    try:
        with suppress(OSError):
            os.read(_STANDARD_INPUT, 1)  # nothing is ever sent: this returns when its other end is closed
        rmtree(folder, ignore_errors=True)  # a process that was killed hasn't
    finally:
        os._exit(1)


def child_in(environ: MutableMapping[str, str]) -> Child | None:
    """Take what a parent has told out of the environment; None without one. Raises UsageError."""
    text = environ.pop(VARIABLE, "")
    if not text:
        return None
    try:
        fields = orjson.loads(text)
        own, others = [tuple(map(int, fields[name])) for name in ("own", "others")]
        return Child(number=int(fields["number"]), folder=Path(fields["folder"]), own=own, others=others)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{VARIABLE}: expected what `gateway run --processes` sets, got {text!r}") from error


def admin_of(folder: Path, number: int) -> Path:
    """Return the unix socket of a child's admin address."""
    return folder / f"{number}.sock"


def lines_of(folder: Path) -> Path:
    return folder / "lines.lock"
