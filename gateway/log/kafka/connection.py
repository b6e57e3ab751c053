"""Connection settings, the diagnosis of failed connections, and stopping aiokafka's clients.

Each line of aiokafka's own log passes once a minute: it repeats a failed connection ten times a second, and every
failure reaches our callers as an error.
"""
# ruff: noqa: SLF001 - there is no public way to see that a task of aiokafka has died, or to end a stop that hangs

import asyncio
import logging
import math
import os
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, client
from aiokafka.abc import AbstractTokenProvider
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest
from typing_extensions import override

from gateway.log.kafka.errors import is_of_a_closed_connection, message_of
from gateway.model import LogUnavailableError

# Together they limit a close to 5 s, whatever has happened to the brokers.
CLOSE_GRACE = 4.0
ABORT_GRACE = 0.5
RETRY_BACKOFF = 0.1
METADATA_AGE = 5.0  # A topic with new partitions, or a recreated one, is known by then. Costs a client a millisecond.
LOG_REPEAT = 60.0
LOG_APPEND_TIME = 1  # A record's type of timestamp.
DIAGNOSIS_TIMEOUT = 3.0  # For finding out why no broker is reached.
CONNECTION_CLOSE_GRACE = 0.2  # Seconds for a connection to close.

# aiokafka keeps requesting the metadata of a deleted topic, and so would have brokers recreate it with their defaults:
# one partition, their own retention, no LogAppendTime.
client.MetadataRequest = partial(MetadataRequest, allow_auto_topic_creation=False)  # type: ignore[assignment,attr-defined]


def _closing_broken_ones(send: Callable[..., Any]) -> Callable[..., Any]:
    """Have a connection that can't be written to end as aiokafka does when asyncio says so.

    uvloop refuses the write with a RuntimeError, which would end whichever task of aiokafka's sends.
    """

    def closing(connection: AIOKafkaConnection, *arguments: object, **named: object) -> Any:  # noqa: ANN401 - untyped there
        try:
            return send(connection, *arguments, **named)
        except RuntimeError as error:  # a KafkaError is one, too
            if isinstance(error, KafkaError) or not is_of_a_closed_connection(error):
                raise
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
            raise KafkaConnectionError(f"Connection at {connection.host}:{connection.port} broken: {error}") from error

    return closing


AIOKafkaConnection.send = _closing_broken_ones(AIOKafkaConnection.send)  # type: ignore[method-assign]
AIOKafkaConnection._send_sasl_token = _closing_broken_ones(AIOKafkaConnection._send_sasl_token)  # type: ignore[method-assign]

Token = Callable[[], Awaitable[str]]
"""Returns a token that is still valid for some time; raises LogUnavailableError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How we and the brokers authenticate: without `tls` nothing is encrypted, without `mechanism` no user is named.

    The mechanisms are Kafka's: PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512 with user and password, OAUTHBEARER with `token`.
    """

    tls: ssl.SSLContext | None = None
    mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    token: Token | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """The same as aiokafka's options."""
        protocol = ("SASL_" if self.mechanism else "") + ("SSL" if self.tls else "PLAINTEXT")
        options: dict[str, Any] = {"security_protocol": protocol, "ssl_context": self.tls}
        if self.mechanism is not None:
            options["sasl_mechanism"] = self.mechanism
        if self.token is not None:
            options["sasl_oauth_token_provider"] = _TokenProvider(self.token)
        elif self.mechanism is not None:
            options |= {"sasl_plain_username": self.username, "sasl_plain_password": self.password}
        return options


PLAIN = Security()


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The bootstrap servers, as `host:port,host:port`, and this process's client id."""

    servers: str
    client_id: str
    security: Security = PLAIN

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of every aiokafka client."""
        return {
            **self.security.options,
            "bootstrap_servers": self.servers,
            "client_id": self.client_id,
            "retry_backoff_ms": int(1000 * RETRY_BACKOFF),
            "metadata_max_age_ms": int(1000 * METADATA_AGE),
        }

    async def problem(self, brokers: Collection[tuple[str, int]] = ()) -> str | None:
        """Return why one of the servers, or of the brokers that they advertise, can't be used; None if all respond.

        A broker that refuses us is more informative than one that is down. aiokafka itself only logs the reason, and
        raises that no broker responded.
        """
        servers = [server.rpartition(":") for server in self.servers.split(",")]
        named = [(host.strip("[]"), int(port)) for host, _, port in servers]
        probed = await asyncio.gather(*[self._probe(host, port) for host, port in dict.fromkeys([*named, *brokers])])
        found = [problem for problem in probed if problem is not None]
        return min(found, key=itemgetter(0))[1] if found else None

    async def _probe(self, host: str, port: int) -> tuple[bool, str] | None:
        """Connect to a broker as a client would; return what fails, preceded by whether the broker didn't respond."""
        connection = AIOKafkaConnection(
            host,
            port,
            client_id=self.client_id,
            request_timeout_ms=int(1000 * DIAGNOSIS_TIMEOUT),
            **self.security.options,
        )
        try:
            async with asyncio.timeout(DIAGNOSIS_TIMEOUT):
                await connection.connect()
                # A client that isn't authorised is disconnected at the first request.
                response = await connection.send(MetadataRequest([], allow_auto_topic_creation=False))
                if self.security.token is not None and not response.brokers:
                    # aiokafka skips the first half of a refusal (RFC 7628, section 3.2.3).
                    raise SaslAuthenticationFailed
        except (KafkaError, OSError, TimeoutError, ValueError, AssertionError) as error:
            is_away = isinstance(error, OSError | TimeoutError) and not isinstance(error, ssl.SSLError)
            return is_away, f"{host}:{port}: {self._reason(error)}"
        finally:
            closed = connection.close()
            if closed is not None:  # otherwise the command may end before its connection
                await asyncio.wait({closed}, timeout=CONNECTION_CLOSE_GRACE)
        return None

    def _reason(self, error: BaseException) -> str:  # noqa: C901, PLR0912 - one case for each way to fail
        """Describe what was expected of a broker, and what happened; of a failed authentication, only that."""
        security = self.security
        cause: BaseException = error
        while isinstance(cause, KafkaConnectionError) and cause.__cause__ is not None:
            cause = cause.__cause__
        match cause:
            case ssl.SSLCertVerificationError():
                expected, got = "a certificate that can be trusted", f": {cause.verify_message.rstrip('.').lower()}"
            case ssl.SSLError(reason=str(reason)) if "ALERT_" in reason:
                alert = reason.partition("ALERT_")[2].replace("_", " ").lower()
                expected, got = "our certificate to be accepted, or none to be asked for", f" the TLS alert: {alert}"
            case ssl.SSLError():
                expected, got = "TLS", f": {(cause.reason or message_of(cause)).replace('_', ' ').lower()}"
            case SaslAuthenticationFailed():
                whose = "with the token" if security.token else f"for user {security.username!r}"
                return f"{security.mechanism} authentication failed {whose}"
            case UnsupportedSaslMechanismError():
                expected, got = f"a broker that supports {security.mechanism}", " one that doesn't"
            case IllegalSaslStateError():
                expected, got = f"a broker that supports {security.mechanism}", " one without SASL on this port"
            case NoTokenError():
                expected, got = "a token", f" none: {cause.__cause__}"
            case TimeoutError() | KafkaTimeoutError():
                expected, got = "a response", f" none in {DIAGNOSIS_TIMEOUT:g} s{self._hint}"
            case asyncio.IncompleteReadError() | ConnectionResetError() | KafkaConnectionError():
                expected, got = "a response", f" the end of the connection{self._hint}"
            case OSError(errno=int(number)) if number > 0:  # asyncio's own message repeats the address
                expected, got = "a broker", f": {os.strerror(number).lower()}"
            case OSError(strerror=str(strerror)):  # name resolution, whose error numbers aren't the system's
                expected, got = "a broker", f": {strerror.lower()}"
            case _:
                expected, got = "a response", f": {message_of(cause)}"
        return f"expected {expected}, got{got}"

    @property
    def _hint(self) -> str:
        return f" (is {self.security.options['security_protocol']} what it speaks?)"


class _TokenProvider(AbstractTokenProvider):
    """aiokafka requests a token before each connection, and handles its own errors only."""

    def __init__(self, token: Token) -> None:
        self._token = token

    @override
    async def token(self) -> str:
        try:
            return await self._token()
        except LogUnavailableError as error:
            raise NoTokenError(str(error)) from error


class NoTokenError(KafkaError):
    """The token endpoint is at fault."""


@contextmanager
def aiokafka_silenced() -> Iterator[None]:
    """Suppress aiokafka's log while the log is opened: the caller reports failures once, and better."""

    def never(_: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("aiokafka")
    logger.addFilter(never)
    try:
        yield
    finally:
        logger.removeFilter(never)


def limit_aiokafka_log() -> None:
    """Filter repeated lines from aiokafka's log, and aiokafka's leftovers from asyncio's."""
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "aiokafka"]:
        logging.getLogger(name).addFilter(_passes)
    logging.getLogger("asyncio").addFilter(_is_ours)


def has_died(user: AIOKafkaProducer | AIOKafkaConsumer) -> bool:
    """Return whether a background task has ended, after which aiokafka goes on without it, or fails each call."""
    if isinstance(user, AIOKafkaProducer):
        tasks, of_member = [user.client._sync_task, user._sender.sender_task], []
    else:
        coordinator, fetching = user._coordinator, getattr(user._fetcher, "_fetch_task", None)
        tasks = [user._client._sync_task, fetching, getattr(coordinator, "_coordination_task", None)]
        # These also end as they should, when a rebalance begins; the next one doesn't replace those that have failed.
        of_member = [getattr(coordinator, name, None) for name in ("_heartbeat_task", "_commit_refresh_task")]
    return any(task is not None and task.done() for task in tasks) or any(
        task is not None and task.done() and not task.cancelled() and task.exception() is not None for task in of_member
    )


async def stop(user: AIOKafkaProducer | AIOKafkaConsumer | AIOKafkaClient, *, grace: float = CLOSE_GRACE) -> None:
    """Stop a client; after `grace` seconds, or if that fails, abort its connections and cancel its tasks.

    aiokafka may wait for a broker forever, and stops halfway when one of its fetches is being cancelled.
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
            user._message_accumulator.fail_all(KafkaTimeoutError("its producer was closed"))
        if not task.done() or task.cancelled() or task.exception() is not None:
            for connection in client._conns.values():
                if connection._writer is not None:
                    connection._writer.transport.abort()  # A flush to a broker that hangs never ends.
            rest = {task, asyncio.create_task(client.close(), name="kafka-close")}
            await asyncio.wait(rest, timeout=ABORT_GRACE)
            for each in rest:
                each.cancel()
            await asyncio.wait(rest)


_passed: dict[tuple[str, str], float] = {}


def _passes(line: logging.LogRecord) -> bool:
    """Return whether a line of aiokafka's log is the first of its kind in a minute."""
    kind = line.name, str(line.msg)  # the format string, of which there are as many as calls in aiokafka's source
    if line.created - _passed.get(kind, -math.inf) < LOG_REPEAT:
        return False
    _passed[kind] = line.created
    return True


def _is_ours(line: logging.LogRecord) -> bool:
    """Return whether a line of asyncio's log isn't about a task of aiokafka's that we stopped waiting for."""
    error = line.exc_info[1] if line.exc_info else None
    trace = error.__traceback__ if error is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    is_within = trace is not None and "aiokafka" in trace.tb_frame.f_code.co_filename
    return not (isinstance(error, KafkaError) or is_within)
