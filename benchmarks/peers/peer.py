"""What a peer is: how it's started, where events are posted to, and how each of them is known where it's delivered."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a peer is started with. Its topic is there, and its own."""

    folder: Path
    """For its configuration and its output."""
    servers: str
    topic: str
    url: str
    """Where events are delivered to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way. It takes POST /in/github with GitHub's signature, and responds once Kafka has the event (`acks=all`).

    `about` says what else it does. `start` raises ToolMissingError if it can't be built here.
    """

    name: str
    about: str
    start: Callable[[Setting], Measured]
