"""Faults: real processes, brokers and sockets, each with a ledger. `--full` runs all of them: `make faults`."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from dev.kafka import Cluster
from tests.acceptance.conftest import LogPlace, embedded_place, folder, kafka_place, place
from tests.conftest import start_kafka
from tests.faults.accounts import Account, rows_of
from tests.faults.scenario import Table

__all__ = ["embedded_place", "folder", "kafka_place", "place"]

ACCOUNTS = pytest.StashKey[list[tuple[str, Account]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ACCOUNTS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    accounts = config.stash[ACCOUNTS]
    if accounts:
        terminalreporter.section("ledgers")
        for line in rows_of(accounts):
            terminalreporter.write_line(line)


@pytest.fixture
def table(pytestconfig: pytest.Config) -> Table:
    """Return what enters a fault's account into the table at the end, and shows its row at once."""
    began = time.monotonic()

    def add(title: str, account: Account) -> None:
        accounts = pytestconfig.stash[ACCOUNTS]
        accounts.append((title, account))
        if "PYTEST_XDIST_WORKER" in os.environ:
            return  # a worker has no terminal, and its table nobody sees
        heading, row = rows_of([(title, account)])
        capture = pytestconfig.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            lines = [heading, row] if len(accounts) == 1 else [row]
            sys.stdout.write("\n" + "\n".join(lines) + f"  {time.monotonic() - began:.0f} s ")
            sys.stdout.flush()

    return add


@pytest.fixture(scope="session")
def three_nodes() -> Iterator[Cluster]:
    """Return a cluster for all tests of a run."""
    cluster = start_kafka(Cluster.start)
    yield cluster
    cluster.stop()


@pytest.fixture
async def cluster(three_nodes: Cluster) -> Cluster:
    """Return it whole, whatever the test before has done to it."""
    await asyncio.to_thread(three_nodes.heal)
    await three_nodes.until_whole()
    return three_nodes


@pytest.fixture
def cluster_place(cluster: Cluster) -> LogPlace:
    return LogPlace(url=f"kafka://{cluster.address}", prefix=f"t{uuid4().hex[:12]}.")
