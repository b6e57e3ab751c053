"""aiokafka's errors → ours: what the cluster forbids is a UsageError, all else a log that is away."""

import contextlib
from collections.abc import Iterator

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    KafkaError,
    NoError,
    PolicyViolationError,
    TopicAuthorizationFailedError,
    for_code,
)

from gateway.model import LogUnavailableError, UsageError

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
def translated(what: str) -> Iterator[None]:
    try:
        yield
    except MISCONFIGURED as error:
        raise UsageError(f"{what}: {say(error)}") from error
    except (KafkaError, KeyError, TimeoutError) as error:
        raise LogUnavailableError(f"{what}: expected an answer, got {say(error)}") from error
    except RuntimeError as error:  # a KafkaError is one, too
        if not is_of_a_closed_connection(error):
            raise
        raise LogUnavailableError(f"{what}: expected an answer, got {say(error)}") from error


def raise_for(code: int, what: str) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error(what)


def say(error: BaseException) -> str:
    return str(error) or type(error).__name__
