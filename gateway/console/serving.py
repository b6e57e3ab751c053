"""The API, and the pages over it, at one address."""

import asyncio
import time

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.access.access import Access
from gateway.access.identity_provider import IdentityProvider, OpenClient
from gateway.access.sign_in import SignIn
from gateway.api.application import add_api
from gateway.api.backend import Backend
from gateway.console.application import add_console
from gateway.console.assets import Assets
from gateway.telemetry.metrics import Metrics


async def add_api_and_console(
    application: web.Application,
    backend: Backend,
    access: Access,
    logger: FilteringBoundLogger,
    *,
    open_client: OpenClient | None = None,
    metrics: Metrics | None = None,
) -> None:
    """Serve the API at `/api/v1`, and the console at `/ui`, whose files are read first.

    An identity provider is asked by `open_client`; without it, people sign in with tokens alone.
    """
    add_api(application, backend, access, logger)
    identity_provider = None if open_client is None else IdentityProvider(open_client, clock=time.time)

    def on_sign_in(how: str) -> None:
        if metrics is not None:
            metrics.access_sign_ins.labels(how).inc()

    sign_in = SignIn(access, identity_provider=identity_provider, on_sign_in=on_sign_in)
    add_console(application, await asyncio.to_thread(Assets), backend, sign_in, logger)
