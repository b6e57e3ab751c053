"""docs/search.md: its queries are queries, it has each field and status, and its bounds are those of the code."""

import re
from pathlib import Path

import pytest

from gateway.index.query import Field, parse_query
from gateway.index.statuses import Status
from gateway.index.terms import MAX_CHARACTERS, MAX_FIELDS
from gateway.settings import IndexSettings

TEXT = (Path(__file__).parent.parent / "docs" / "search.md").read_text(encoding="utf-8")
[BLOCK] = re.findall(r"^```text\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
QUERIES = BLOCK.splitlines()
ROW = re.compile(r"^\| ((?:`[^`]+`(?:, )?)+) \|", re.MULTILINE)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_one(query: str) -> None:
    found = parse_query(query, now=1_764_590_400.0)
    assert found.conditions or found.since


def test_the_examples_have_every_field_and_so_has_the_table() -> None:
    shown = [parse_query(query, now=0.0) for query in QUERIES]
    assert {each.field for query in shown for each in query.conditions} == set(Field)
    cells = [code for row in ROW.findall(TEXT) for code in re.findall(r"`([^`]+)`", row)]
    of_queries = [cell.replace("…", "x") for cell in cells if not cell.startswith("--") and cell not in list(Status)]
    told = [parse_query(cell, now=0.0) for cell in of_queries]
    assert {each.field for query in told for each in query.conditions} == set(Field)
    assert {"since", "until"} <= {cell.partition(":")[0] for cell in cells}


def test_it_has_every_status() -> None:
    table = TEXT.partition("| status | meaning |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Status)


def test_its_bounds_are_those_of_the_code() -> None:
    assert f"{MAX_CHARACTERS:,} characters and {MAX_FIELDS:,} fields" in " ".join(TEXT.split())
    assert IndexSettings() == IndexSettings(file=Path("index.db"), days=7.0, bytes=8 << 30)
    assert all(default in TEXT for default in ("| `index.db` |", "| 7 |", "| `8GiB` |"))
