"""Credentials for Kafka, from settings, files and a token endpoint."""

import asyncio
from pathlib import Path

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.http1 import ResponseReader
from gateway.client.oauth import NoTokenError, Tokens
from gateway.client.request import Outbound
from gateway.log.kafka.connection import Security
from gateway.model import LogUnavailableError, UsageError
from gateway.rules.destination_credentials import TlsError, expiries_of, tls_of
from gateway.rules.rules import DestinationAccess, Egress, OAuth2, Tls
from gateway.rules.yaml_document import reason_of
from gateway.settings import KafkaSecurity, SaslMechanism

TOKEN_TIMEOUT = 3.0  # Less than the timeout of opening a log.
TOKEN_AGE = 60.0
"""Seconds for which connections share a token: we don't learn that a broker has refused it."""


async def load_security(settings: KafkaSecurity) -> Security:
    """Read the files that the settings name. Raises UsageError, which never shows their content."""
    return await asyncio.to_thread(_read, settings)


def kafka_certificate_expiries(settings: KafkaSecurity) -> dict[str, float]:
    """Return when (Unix seconds) our own certificate and the brokers' authorities expire: `certificate`, `ca`.

    Blocks for a while. Raises UsageError.
    """
    return expiries_of(_tls(settings)) if settings.protocol.has_tls else {}


class _TokenEndpoint:
    """A token endpoint at which this process is a client. The token is for the log only, and used for a minute."""

    def __init__(self, url: str, access: DestinationAccess) -> None:
        self._url = url
        self._access = access
        self._tokens: Tokens | None = None

    async def token(self) -> str:
        """Return a token. Raises LogUnavailableError, within 3 s."""
        loop = asyncio.get_running_loop()
        if self._tokens is None:
            self._tokens = Tokens(self._fetch, loop.time)
        try:
            token = await self._tokens.recent(self._url, self._access, loop.time() + TOKEN_TIMEOUT, max_age=TOKEN_AGE)
        except NoTokenError as error:
            raise LogUnavailableError(str(error)) from error
        return token.value.removeprefix(b"Bearer ").decode("ascii")

    async def _fetch(self, outbound: Outbound, deadline: float) -> ResponseReader:
        # A new client each time, once a minute at most, so that it needn't be closed with the log.
        async with Client(EgressGuard(Egress())) as client:
            return await client.request_token(outbound, deadline)


def _read(settings: KafkaSecurity) -> Security:
    mechanism, password = settings.mechanism, _secret("--kafka-sasl-password-file", settings.password_file)
    tls = _tls(settings).context if settings.protocol.has_tls else None
    if mechanism is not SaslMechanism.OAUTHBEARER:
        return Security(tls=tls, mechanism=mechanism, username=settings.username, password=password)
    assert settings.token_url is not None
    assert settings.username is not None
    assert password is not None
    client = OAuth2(
        token_url=settings.token_url,
        client_id=settings.username,
        client_secret=password,
        scope=tuple((settings.scope or "").split()),
        audience=settings.audience,
    )
    return Security(
        tls=tls, mechanism=mechanism, token=_TokenEndpoint(settings.token_url, DestinationAccess(oauth2=client)).token
    )


def _tls(settings: KafkaSecurity) -> Tls:
    files = {"ca": settings.ca, "certificate": settings.certificate, "key": settings.key or settings.certificate}
    texts = {name: _text(f"--kafka-ssl-{name}", path) for name, path in files.items()}
    try:
        return tls_of(**texts)
    except TlsError as error:
        raise UsageError(f"--kafka-ssl-{error.key}: {error}") from None


def _secret(where: str, path: Path | None) -> str | None:
    text = _text(where, path)
    if text is not None and not text.strip():
        raise UsageError(f"{where}: expected a secret in {path}, got nothing")
    return None if text is None else text.rstrip("\r\n")  # editors add a line end to a file


def _text(where: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{where}: expected a file, got {path}: {reason_of(error)}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{where}: expected text in UTF-8 in {path}, got other bytes") from None
