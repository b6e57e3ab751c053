"""The tables of deploy/connect in a real ClickHouse: rows as its sink writes them, and the queries of docs/search.md.

The sink itself is in no registry. What it is given is what `test_connect.py` sees the transforms make of our records.
"""

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_connect import ATTEMPTS, CONNECT, EVENTS, KINDS, NOT_OURS, records

ROOT = Path(__file__).parent.parent.parent
SEARCH = ROOT / "docs" / "search.md"
NOW = datetime.now(UTC)
TIMEOUT = 300.0

# It is 180 MB, and fetched once.
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

Ask = Callable[..., list[dict[str, Any]]]
FIELDS = {
    "events": {
        "ce_id": "id",
        "ce_source": "source",
        "ce_type": "type",
        "gw_at": "received",
        "gw_key": "key",
        "gw_query": "query",
        "gw_headers": "headers",
    },
    "attempts": {"gw_type": "type", "gw_attempt": "attempt", "gw_headers": "headers"},
}


@pytest.fixture(scope="module")
def ask(tool: Callable[[str], Path]) -> Ask:
    """Return what makes the tables, fills them twice over, and returns the rows of the statements that it is given."""
    program = tool("chdb")

    def run(*statements: str) -> list[dict[str, Any]]:
        sql = re.sub(r"--.*", "", (CONNECT / "clickhouse.sql").read_text())
        made = [each for each in sql.split(";") if each.strip()]
        filled = [each for kind in KINDS for _ in range(2) for each in inserts(kind)]  # as after a commit that failed
        result = subprocess.run(
            [program],
            input=json.dumps([*made, *filled, *statements]),
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


def inserts(kind: str) -> list[str]:
    """Return the statements that insert a topic's records, each with a column for each field that the sink gets."""
    rows = [row(kind, offset, record) for offset, record in enumerate(records(kind))]
    return [f"INSERT INTO webhooks.{kind} ({','.join(each)}) VALUES ({','.join(each.values())})" for each in rows]


def row(kind: str, offset: int, record: Any) -> Mapping[str, str]:
    columns = {"body": record.value} | ({"event_id": record.key} if kind == "attempts" else {})
    columns |= {FIELDS[kind][name]: value for name, value in record.headers if name in FIELDS[kind]}
    texts = {name: f"unhex('{value.hex()}')" for name, value in columns.items()}
    stored = f"toDateTime64('{NOW:%Y-%m-%d %H:%M:%S}', 3, 'UTC')"
    return texts | {"topic": f"'gateway.{kind}'", "partition": "0", "offset": str(offset), "stored_at": stored}


def test_a_record_is_one_row_however_often_it_was_written(ask: Ask) -> None:
    for kind in KINDS:
        [found] = ask(f"SELECT count() AS n, uniqExact(offset) AS offsets FROM webhooks.{kind} FINAL")
        assert {int(found["n"]), int(found["offsets"])} == {len(records(kind))}


def test_an_event_is_found_with_its_body_as_it_came(ask: Ask) -> None:
    found = ask(
        "SELECT id, source, type, key, query, headers, hex(body) AS body, toUnixTimestamp64Micro(received_at) AS at "
        "FROM webhooks.events FINAL ORDER BY offset"
    )
    assert bytes.fromhex(found[0]["body"]) == NOT_OURS.value
    for event, each in zip(EVENTS, found[1:], strict=True):
        assert (each["id"], each["source"], each["type"]) == (event.id, event.source, event.type)
        assert (each["key"], each["query"]) == (event.key or "", event.query)
        assert bytes.fromhex(each["body"]) == event.body
        assert int(each["at"]) == round(event.received_at * 1e6)


def test_an_attempt_has_what_its_json_says_and_another_programs_holds_nothing_up(ask: Ask) -> None:
    found = ask(
        "SELECT event_id, route, destination, number, result, decision, status, seconds, body, "
        "toUnixTimestamp64Milli(began_at) AS at FROM webhooks.attempts FINAL ORDER BY offset"
    )
    assert (found[0]["route"], found[0]["status"]) == ("", 0)
    for attempt, each in zip(ATTEMPTS, found[1:], strict=True):
        assert (each["event_id"], each["route"], each["destination"]) == (
            attempt.event_id,
            attempt.route,
            attempt.destination,
        )
        assert (each["number"], each["result"], each["decision"]) == (attempt.number, attempt.result, attempt.decision)
        assert (each["status"], each["seconds"]) == (attempt.status, attempt.seconds)
        assert int(each["at"]) == round(attempt.at * 1000)


def queries() -> list[str]:
    [block] = re.findall(r"^```sql\n(.*?)^```", SEARCH.read_text(), re.MULTILINE | re.DOTALL)
    return [each.strip() for each in block.split(";") if each.strip()]


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.splitlines()[0].removeprefix("-- "))
def test_a_query_of_the_documents_finds_something(ask: Ask, query: str) -> None:
    assert ask(query)
