"""Records that no gateway wrote, in every topic of a cluster of three brokers."""

from pathlib import Path

import pytest

from tests.acceptance.conftest import LogPlace
from tests.acceptance.test_foreign_records import withstood
from tests.faults.scenario import Table, account_of

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


async def test_foreign_records_stop_no_gateway_on_a_cluster(
    cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    found = await withstood(cluster_place, folder)
    account = account_of([found.load], {"first": found.first, "second": found.second})
    table(f"{found.records} records that no gateway wrote, kafka", account)
    assert (account.lost, account.altered, account.duplicated) == (0, 0, 0), account
    assert (account.refused, account.acknowledged) == (0, found.load.acknowledged_count)
