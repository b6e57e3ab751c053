"""The log that the settings name, for a process and for commands."""

import socket

from gateway.log.base import Log
from gateway.log.embedded.log import EmbeddedLog
from gateway.settings import EmbeddedTarget, Settings


async def open_log(settings: Settings, *, owner: bool) -> Log:
    """Open the log that the settings name. Raises UsageError, or LogUnavailableError if it doesn't respond."""
    if isinstance(settings.log, EmbeddedTarget):
        return await EmbeddedLog.open(settings.log.path, owner=owner)
    from gateway.kafka_credentials import load_security  # noqa: PLC0415 - with Kafka's, a part of each start
    from gateway.log.kafka.log import CLIENT_ID, KafkaLog  # noqa: PLC0415 - an embedded log needs neither

    # No other process has this host and admin port, except this one's successor, which takes over its memberships.
    client_id = f"gateway-{socket.gethostname()}-{settings.admin.port}" if owner and settings.admin.port else CLIENT_ID
    security = await load_security(settings.kafka)
    return await KafkaLog.open(",".join(settings.log.servers), client_id=client_id, security=security)
