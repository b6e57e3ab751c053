"""Translates aiokafka's errors: what the cluster forbids is a ForbiddenError, anything else LogUnavailableError."""

import contextlib
from collections.abc import Iterator

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    NodeNotReadyError,
    NoError,
    PolicyViolationError,
    TopicAuthorizationFailedError,
    for_code,
)

from gateway.model import ForbiddenError, LogUnavailableError

FORBIDDEN = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)
MISCONFIGURED = (
    *FORBIDDEN,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    PolicyViolationError,
)


def is_of_a_closed_connection(error: RuntimeError) -> bool:
    """Return whether this is how uvloop refuses a write to a transport that is closed: aiokafka expects an OSError."""
    return str(error).endswith("the handler is closed")


@contextlib.contextmanager
def kafka_errors() -> Iterator[None]:
    """Raise as a KafkaError what else aiokafka raises for a connection that is closed, or replaced by another."""
    try:
        yield
    except KeyError as error:
        raise NodeNotReadyError(f"no connection to node {error}") from error
    except RuntimeError as error:  # a KafkaError is one, too
        if isinstance(error, KafkaError) or not is_of_a_closed_connection(error):
            raise
        raise KafkaConnectionError(str(error)) from error


@contextlib.contextmanager
def translated_errors(what: str) -> Iterator[None]:
    try:
        yield
    except MISCONFIGURED as error:
        raise ForbiddenError(f"{what}: {message_of(error)}") from error
    except (KafkaError, KeyError, TimeoutError) as error:
        raise LogUnavailableError(f"{what}: expected a response, got {message_of(error)}") from error
    except RuntimeError as error:  # a KafkaError is one, too
        if not is_of_a_closed_connection(error):
            raise
        raise LogUnavailableError(f"{what}: expected a response, got {message_of(error)}") from error


def raise_for(code: int, what: str) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error(what)


def message_of(error: BaseException) -> str:
    return str(error) or type(error).__name__
