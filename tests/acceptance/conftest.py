"""Gateways as processes, on real logs."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

import gateway.kafka_credentials  # noqa: F401 - `open_log` imports it late: its files would be read in the event loop
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.ops.control_client import ControlClient
from gateway.settings import from_sources
from tests.load import SECRET

SOURCES = f"""
version: 1
sources:
  github: {{{{verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}}}}}
"""
"""What every rule file begins with; to be formatted, with the rest of it."""
RULES = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
routes:
  - {{name: all, from: github, to: [first, second]}}
"""
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """Where gateways of one test keep their log: the values of `--log` and `--topic-prefix`."""

    url: str
    prefix: str

    @property
    def kind(self) -> str:
        return "kafka" if self.is_kafka else "embedded"

    @property
    def is_kafka(self) -> bool:
        return self.url.startswith("kafka:")

    def another(self, name: str) -> "LogPlace":
        """Return a fresh place beside this one."""
        if self.is_kafka:
            return LogPlace(url=self.url, prefix=f"{self.prefix}{name}.")
        return LogPlace(url=f"sqlite:///{self.path.with_name(name)}.db", prefix=self.prefix)

    @property
    def servers(self) -> str:
        """The brokers' addresses."""
        return self.url.removeprefix("kafka://")

    @property
    def path(self) -> Path:
        """The embedded log's file."""
        return Path(self.url.removeprefix("sqlite:///"))


@asynccontextmanager
async def operators(place: LogPlace) -> AsyncIterator[ControlClient]:
    """Open what the commands of operators use, beside the gateway."""
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    try:
        yield ControlClient(log, Topics(place.prefix))
    finally:
        await log.close()


@pytest.fixture
def embedded_place(tmp_path: Path) -> LogPlace:
    return LogPlace(url=f"sqlite:///{tmp_path / 'gateway.db'}", prefix="gateway.")


@pytest.fixture
def kafka_place(kafka: str) -> LogPlace:
    return LogPlace(url=f"kafka://{kafka}", prefix=f"t{uuid4().hex[:12]}.")


@pytest.fixture(params=["embedded", "kafka"])
def place(request: pytest.FixtureRequest) -> LogPlace:
    """Return a fresh place of each kind in turn."""
    found: LogPlace = request.getfixturevalue(f"{request.param}_place")
    return found


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.full)])
def long_place(request: pytest.FixtureRequest) -> LogPlace:
    """Return a fresh place of the embedded log; and with --full one of Kafka, too: of what takes long."""
    found: LogPlace = request.getfixturevalue(f"{request.param}_place")
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Give the files of a test up when it is over: a full run leaves hundreds of megabytes."""
    yield tmp_path
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix in {".db", ".log", ".db-wal"}:
            file.unlink()
