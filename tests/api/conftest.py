"""The API over a log in memory, with its index and its rules, as a process serves it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from typing_extensions import override

from gateway.access.access import Access
from gateway.access.principal import AccessRole, Principal
from gateway.api.application import add_api
from gateway.api.backend import Backend
from gateway.api.cache import CacheByKey
from gateway.api.endpoints import BASE
from gateway.api.traffic_readings import TrafficReadings
from gateway.index.index import Index, open_index
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from tests.api.answers import problems_of
from tests.index.company import Company
from tests.index.conftest import Ticking
from tests.memory_log import MemoryLog

Client = TestClient[web.Request, web.Application]

RULES = """
version: 1
sources:
  github:
    path: /github
    owner: platform
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
  stripe:
    path: /stripe
    owner: payments
    verify: {scheme: token, header: X-Token, secrets: ["${TOKEN}"]}
destinations:
  ci: {url: "https://ci.example/hooks/secret"}
  ledger: {url: "https://ledger.example/", owner: payments, rate: 10/s}
routes:
  - name: build
    from: github
    match: {type: push}
    to: ci
    owner: platform
  - name: book
    from: stripe
    when: "body.amount > 10"
    to: ledger
    owner: payments
  - name: audit
    from: [github, stripe]
    to: ledger
"""
SINCE = 1_764_532_800.0


class As(Access):
    """Lets a test be anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.principal: Principal | None = None
        self.others: Iterator[str] = iter(())
        """The names of those who ask instead, with the same rights, one after the other."""

    @override
    def principal_of(self, request: web.Request) -> Principal:
        if self.principal is None:
            return super().principal_of(request)
        name = next(self.others, None)
        return self.principal if name is None else replace(self.principal, name=name)


@dataclass
class World:
    """A log, its index, and the API over them. `index` is what the process has open."""

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

    async def ask(self, method: str, path: str, status: int = 200, **given: Any) -> Any:
        """Return the JSON that a path below the API's own has, which must come with a status."""
        async with self.client.request(method, f"{BASE}{path}", **given) as response:
            body = await response.read()
            assert response.status == status, (path, response.status, body)
            answer = orjson.loads(body)
            assert problems_of(method, path, status, response.content_type, answer) == []
            return answer

    async def get(self, path: str, status: int = 200, **parameters: Any) -> Any:
        return await self.ask("GET", path, status, params=parameters)

    async def post(
        self, path: str, body: object, status: int = 202, *, headers: Mapping[str, str] | None = None
    ) -> Any:
        return await self.ask("POST", path, status, json=body, headers=headers)

    def become(self, role: AccessRole | None, **limits: frozenset[str]) -> None:
        """Let the next requests be somebody's; None: whose they are."""
        self.access.principal = None if role is None else Principal(name="anna", role=role, via="test", **limits)


def rules_of(path: Path, text: str = RULES) -> Rules:
    path.write_text(text)
    return load_rules(path, environ={"TOKEN": "a-secret-token"})


@asynccontextmanager
async def world_of(company: Company, folder: Path, text: str = RULES) -> AsyncIterator[World]:
    """Serve the API of a log."""
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
        )
        add_api(application, backend, access, structlog.get_logger())
        async with TestClient(TestServer(application)) as client:
            made = World(company, client, access, backend, rules, index)
            yield made


@pytest.fixture
async def company() -> Company:
    return await Company.found(MemoryLog(now=Ticking()))


@pytest.fixture
async def world(company: Company, tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(company, tmp_path) as made:
        yield made
