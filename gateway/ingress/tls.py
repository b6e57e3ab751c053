"""TLS at the ingress: certificates that are replaced while connections are open, and those of clients.

files ──changed, and stable──▶ read ──▶ contexts of new connections        open connections stay as they are
                                └─ a problem: the previous certificates stay, logged, in a metric and in /status
"""

import asyncio
import math
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from gateway.model import UsageError
from gateway.rules.file_stamps import stamps_of
from gateway.rules.server_certificates import ServerCertificate, ServerNames, read_certificates
from gateway.rules.watch import Watch
from gateway.telemetry.metrics import Metrics
from gateway.verify.client_certificates import VerifiedCertificate, fingerprint

WATCH_INTERVAL = 1.0
"""Seconds between checks of the files."""
REREAD_INTERVAL = 10.0
"""Seconds after which files that couldn't be used are read again, as that may have been the disk's fault."""
MAX_SESSIONS = 20_480
"""Certificates of clients whose chain is remembered: OpenSSL keeps as many sessions of TLS 1.2."""


class ServerTls:
    """Has the `context` of new connections, after `load`. `files` are those of certificates and their keys."""

    def __init__(self, files: Sequence[tuple[Path, Path]], *, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self._files = files
        self._paths = list(chain(*files))
        self._metrics = metrics
        self._logger = logger
        self._certificates: tuple[ServerCertificate, ...] = ()
        self._authorities: frozenset[bytes] = frozenset()
        self._names: ServerNames
        self._watch: Watch
        self._refusal: tuple[float, str] | None = None
        self._reread_at = math.inf
        self._issuers: dict[bytes, tuple[bytes, ...]] = {}
        self._interned: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}
        """The same chains, once each: few authorities issue many certificates."""

    @property
    def context(self) -> ssl.SSLContext:
        return self._names.default

    async def load(self) -> None:
        """Read the files for the first time. Raises UsageError."""
        before = await asyncio.to_thread(stamps_of, self._paths)
        self._use(await asyncio.to_thread(read_certificates, self._files))
        self._watch = Watch(before)

    def trust(self, authorities: frozenset[bytes]) -> None:
        """Ask new clients for a certificate of these authorities (DER); of none, ask for none."""
        if authorities != self._authorities:
            self._authorities = authorities
            self._issuers.clear()  # so that no previous context resumes a session
            self._interned.clear()
            self._build()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            await self.poll()

    async def poll(self) -> None:
        """Look at the files, and read them if they have changed and are stable, or again if they were refused."""
        stamps = await asyncio.to_thread(stamps_of, self._paths)
        has_changed = self._watch.observe(stamps)
        if not has_changed and not (self._watch.is_at_rest and time.monotonic() >= self._reread_at):
            return
        self._watch.mark_read(stamps)
        try:
            certificates = await asyncio.to_thread(read_certificates, self._files)
        except UsageError as error:
            problems = str(error).splitlines()
            before = self._refusal
            self._refusal = (time.time() if before is None else before[0], problems[0])
            self._reread_at = time.monotonic() + REREAD_INTERVAL
            self._metrics.certificate_refused.set(1)
            if has_changed or before != self._refusal:
                self._logger.error("certificate_refused", problems=problems)
            return
        self._use(certificates)
        self._logger.info("certificate_reloaded", names=[each.name for each in certificates])

    def status(self, now: float) -> Mapping[str, Any]:
        """Return what `/status` tells: since when new files are refused, and for how long each certificate is valid."""
        return {
            "refused": None if self._refusal is None else dict(zip(("since", "problem"), self._refusal, strict=True)),
            "expiries": [
                {"name": each.name, "until": each.until, "left": each.until - now} for each in self._certificates
            ],
        }

    def presented(self, connection: ssl.SSLObject) -> VerifiedCertificate | None:
        """Return the certificate that a client has authenticated itself with; None if it has none."""
        certificate = connection.getpeercert(binary_form=True)
        if certificate is None:
            return None
        key = fingerprint(certificate)
        issuers = tuple(_verified_chain(connection)[1:])
        if issuers:
            self._issuers.pop(key, None)
            if len(self._issuers) >= MAX_SESSIONS:
                del self._issuers[next(iter(self._issuers))]
            issuers = self._issuers[key] = self._interned.setdefault(issuers, issuers)
        else:  # a session of TLS 1.2 that is resumed has no chain; this context has seen it when the session began
            issuers = self._issuers.get(key, ())
        return VerifiedCertificate(certificate, issuers)

    def _use(self, certificates: tuple[ServerCertificate, ...]) -> None:
        self._certificates = certificates
        self._build()
        self._refusal, self._reread_at = None, math.inf
        self._metrics.certificate_refused.set(0)
        expiries = {each.name: each.until for each in sorted(certificates, key=lambda each: each.until, reverse=True)}
        self._metrics.set_certificate_expiries("ingress", expiries)

    def _build(self) -> None:
        if self._certificates:
            self._names = ServerNames(self._certificates, sorted(self._authorities))


def without_clients_names(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a `sys.unraisablehook` without what Python reports of a name (SNI) that isn't ASCII.

    Its handshake fails, which is counted. The report is a traceback with the client's bytes, for each such handshake.
    """

    def report(unraisable: Any) -> None:  # noqa: ANN401 - a type that `sys` doesn't have
        if not (isinstance(unraisable.exc_value, UnicodeDecodeError) and isinstance(unraisable.object, bytes)):
            hook(unraisable)

    return report


def _verified_chain(connection: ssl.SSLObject) -> Sequence[bytes]:
    """Return the chain that OpenSSL has verified (DER), the client's own certificate first; empty if resumed."""
    if hasattr(connection, "get_verified_chain"):  # since Python 3.13
        return list(connection.get_verified_chain())
    # Before, it is the same function without its public name (https://github.com/python/cpython/issues/109109).
    chain = connection._sslobj.get_verified_chain()  # type: ignore[attr-defined]  # noqa: SLF001
    return [certificate.public_bytes(_DER) for certificate in chain or ()]


_DER = 2  # ENCODING_DER of `_ssl`
