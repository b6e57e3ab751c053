"""How a broker is reached, and how a client of aiokafka is let go.

Of aiokafka's own log each line passes once a minute: it repeats a failed connection ten times a second, and whatever
fails reaches our callers as an error.
"""
# ruff: noqa: SLF001 - nothing public tells that a task of aiokafka has died, or ends a stop that waits for ever

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError, KafkaTimeoutError

# Together they bound a close by 5 s, whatever has happened to the brokers.
CLOSE_GRACE = 4.0
CLOSE_REST = 0.5
RETRY_BACKOFF = 0.1
METADATA_AGE = 60.0
LOG_REPEAT = 60.0
LOG_APPEND_TIME = 1  # A record's type of timestamp.


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The brokers to begin with, as `host:port,host:port`, and what this process calls itself."""

    servers: str
    client_id: str

    @property
    def options(self) -> Mapping[str, Any]:
        """What every client of aiokafka is made with."""
        return {
            "bootstrap_servers": self.servers,
            "client_id": self.client_id,
            "retry_backoff_ms": int(1000 * RETRY_BACKOFF),
            "metadata_max_age_ms": int(1000 * METADATA_AGE),
        }


def quieten() -> None:
    """Let pass of aiokafka's log what is new, and of asyncio's what isn't aiokafka's."""
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "aiokafka"]:
        logging.getLogger(name).addFilter(_passes)
    logging.getLogger("asyncio").addFilter(_is_ours)


def has_died(user: AIOKafkaProducer | AIOKafkaConsumer) -> bool:
    """Tell whether a background task has ended, of which aiokafka tells nobody."""
    if isinstance(user, AIOKafkaProducer):
        tasks = [user.client._sync_task, user._sender.sender_task]
    else:
        coordination = getattr(user._coordinator, "_coordination_task", None)
        fetching = getattr(user._fetcher, "_fetch_task", None)
        tasks = [user._client._sync_task, fetching, coordination]
    return any(task is not None and task.done() for task in tasks)


async def stop(user: AIOKafkaProducer | AIOKafkaConsumer | AIOKafkaClient, *, grace: float = CLOSE_GRACE) -> None:
    """Stop in order; after `grace` seconds, or where that fails, see that no connection and no task is left.

    aiokafka may wait for a broker for ever, and gives up halfway when a fetch of its own is being cancelled.
    """
    if isinstance(user, AIOKafkaClient):
        client, stopping = user, user.close()
    elif isinstance(user, AIOKafkaProducer):
        client, stopping = user.client, user.stop()
    else:
        client, stopping = user._client, user.stop()
    task = asyncio.create_task(stopping, name="kafka-stop")
    try:
        await asyncio.wait({task}, timeout=grace)
    finally:
        if isinstance(user, AIOKafkaProducer):
            user._message_accumulator.fail_all(KafkaTimeoutError("the log was closed"))
        if not task.done() or task.cancelled() or task.exception() is not None:
            for connection in client._conns.values():
                if connection._writer is not None:
                    connection._writer.transport.abort()  # A flush to a broker that hangs never ends.
            rest = {task, asyncio.create_task(client.close(), name="kafka-close")}
            await asyncio.wait(rest, timeout=CLOSE_REST)
            for each in rest:
                each.cancel()
            await asyncio.wait(rest)


_passed: dict[tuple[str, str], float] = {}


def _passes(line: logging.LogRecord) -> bool:
    """Tell whether a line of aiokafka's log is the first of its kind in a minute."""
    kind = line.name, str(line.msg)  # Before its values are put in: there are as many as calls in aiokafka's source.
    if line.created - _passed.get(kind, -math.inf) < LOG_REPEAT:
        return False
    _passed[kind] = line.created
    return True


def _is_ours(line: logging.LogRecord) -> bool:
    """Tell whether what asyncio complains of isn't what aiokafka leaves behind where we gave up waiting for it."""
    error = line.exc_info[1] if line.exc_info else None
    trace = error.__traceback__ if error is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    is_within = trace is not None and "aiokafka" in trace.tb_frame.f_code.co_filename
    return not (isinstance(error, KafkaError) or is_within)
