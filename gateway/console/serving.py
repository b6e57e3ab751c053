"""The API, and the pages over it, at one address."""

import asyncio

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.access.access import Access
from gateway.api.application import add_api
from gateway.api.backend import Backend
from gateway.console.application import add_console
from gateway.console.look import Look


async def add_api_and_console(
    application: web.Application, backend: Backend, access: Access, logger: FilteringBoundLogger
) -> None:
    """Serve the API at `/api/v1`, and the console at `/ui`, whose files are read first."""
    add_api(application, backend, access, logger)
    add_console(application, await asyncio.to_thread(Look), backend, access, logger)
