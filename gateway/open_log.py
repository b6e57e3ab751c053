"""The log that the settings name, for a process and for commands."""

import socket
from pathlib import Path

from gateway.log.base import Log
from gateway.log.deferred import DeferredLog
from gateway.log.embedded.log import EmbeddedLog
from gateway.settings import EmbeddedTarget, Settings
from gateway.spool.store import refuse_spool


async def open_log(settings: Settings, *, owner: bool) -> Log:
    """Open the log that the settings name. Raises UsageError, or LogUnavailableError if it doesn't respond."""
    if isinstance(settings.log, EmbeddedTarget):
        return await _open_embedded(settings.log.path, owner=owner)
    from gateway.kafka_credentials import load_security  # noqa: PLC0415 - with Kafka's, a part of each start
    from gateway.log.kafka.log import CLIENT_ID, KafkaLog  # noqa: PLC0415 - an embedded log needs neither

    # No other process has this host and admin port, except this one's successor, which takes over its memberships.
    client_id = f"gateway-{socket.gethostname()}-{settings.instance}" if owner and settings.admin.port else CLIENT_ID
    security = await load_security(settings.kafka)
    # What may have been stored goes to a spool, if there is one, and is looked for before it is appended again.
    repeats = settings.spool.file is None
    return await KafkaLog.open(",".join(settings.log.servers), client_id=client_id, security=security, repeats=repeats)


async def _open_embedded(path: Path, *, owner: bool) -> Log:
    log = await EmbeddedLog.open(path, owner=owner)
    try:
        await refuse_spool(log, path)
    except BaseException:
        await log.close()
        raise
    return log


def log_to_open(settings: Settings) -> DeferredLog:
    """Return the Kafka that the settings name, for its owner, to be opened once it responds."""
    from gateway.log.kafka.appender import MAX_RECORD_BYTES  # noqa: PLC0415 - as above

    return DeferredLog(lambda: open_log(settings, owner=True), max_record_bytes=MAX_RECORD_BYTES)
