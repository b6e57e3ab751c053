"""The console over a log in memory, with its index and its rules, as a process serves it."""

import asyncio
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from gateway.access.principal import AccessRole, Principal
from gateway.access.sign_in import SignIn
from gateway.api.application import add_api
from gateway.api.backend import Backend
from gateway.api.cache import CacheByKey
from gateway.api.traffic_readings import TrafficReadings
from gateway.console.application import add_console
from gateway.console.assets import Assets
from gateway.engine.delivery.holds import Hold
from gateway.index.index import Index, open_index
from gateway.rules.rules import Rules
from tests.api.conftest import RULES, SINCE, As, rules_of
from tests.console.markup import Document
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog
from tests.tools import needed

Client = TestClient[web.Request, web.Application]


@dataclass
class Console:
    """A log, its index, and the pages over them. `index` is what the process has open."""

    company: Company
    client: Client
    access: As
    backend: Backend
    rules: Rules
    index: Index | None

    async def refresh(self) -> None:
        assert self.index is not None
        await self.index.refresh()
        # A machine that is busy takes long to count, and what took long is kept.
        self.backend.traffic, self.backend.shared = TrafficReadings(), CacheByKey()

    async def page(self, *segments: str, expect: int = 200, **query: Any) -> Document:
        """Return a page, which must come with a status, be well-formed, and let nothing in."""
        path = "/".join(["/ui", *[quote(each, safe="") for each in segments]])
        return await self.at(path, expect=expect, **query)

    async def at(self, path: str, *, expect: int = 200, **query: Any) -> Document:
        """Return the page at an address of this console, as a link has it."""
        async with self.client.get(path, params=query or None, allow_redirects=False) as response:
            body = await response.text()
            assert response.status == expect, (path, response.status, body)
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
            document = Document(body)
            assert document.problems == []
            return document

    async def post(self, path: str, fields: Mapping[str, str], *, expect: int = 303, **headers: str) -> str:
        """Send a form, and return the address that is answered, or the page."""
        async with self.client.post(path, data=fields, headers=headers, allow_redirects=False) as response:
            text = await response.text()
            assert response.status == expect, (path, response.status, text)
            return response.headers["Location"] if expect == 303 else text

    def become(self, role: AccessRole | None, **limits: frozenset[str]) -> None:
        """Let the next requests be somebody's; None: whose they are."""
        self.access.principal = None if role is None else Principal(name="anna", role=role, via="test", **limits)


@asynccontextmanager
async def console_of(
    company: Company, folder: Path, text: str = RULES, holds: Mapping[str, Hold] | None = None
) -> AsyncIterator[Console]:
    """Serve the console of a log."""
    rules = await asyncio.to_thread(rules_of, folder / "routes.yaml", text)
    access = As()
    application = web.Application()
    async with open_index(folder / "index.db", company.log, company.topics) as index:
        backend = Backend(
            log=company.log,
            topics=company.topics,
            rules=lambda: made.rules,
            rules_status=lambda: {
                "file": str(folder / "routes.yaml"),
                "loaded_at": SINCE,
                "changed": (),
                "refused": False,
                "refusal": None,
            },
            index=lambda: made.index,
            holds=lambda: holds or {},
        )
        add_api(application, backend, access, structlog.get_logger())
        add_console(application, await asyncio.to_thread(read_assets), backend, SignIn(access), structlog.get_logger())
        async with TestClient(TestServer(application)) as client:
            made = Console(company, client, access, backend, rules, index)
            yield made


@cache
def read_assets() -> Assets:
    """Return the console's templates: each process reads them once, which takes longer than most tests."""
    return Assets()


@pytest.fixture
async def company() -> Company:
    return await Company.found(MemoryLog(now=Ticking()))


@pytest.fixture
async def console(company: Company, tmp_path: Path) -> AsyncIterator[Console]:
    async with console_of(company, tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a browser's debugger; it is started when the first test asks."""
    program, folder = needed("chromium"), tmp_path_factory.mktemp("chromium")
    command = [str(program), *BROWSER_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = next((line for line in process.stderr if line.startswith("DevTools listening on ")), "")
        reader = threading.Thread(target=process.stderr.read)  # a full pipe would stop it
        reader.start()
        try:
            assert found, "expected the browser to tell where it listens"
            yield found.removeprefix("DevTools listening on ").strip()
        finally:
            process.terminate()
            reader.join()


BROWSER_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the script that judges pages."""
    return needed("axe").read_text(encoding="utf-8")
