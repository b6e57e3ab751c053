"""Kafka Connect: what deploy/connect makes of the records that the gateway writes.

The vendors' sinks are in no registry, so the connectors run with Kafka's file sink in their place, and with all else as
it is configured: converters, transforms, the worker. Where a body is bytes, one more transform writes it as base64.
"""

import asyncio
import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from dev.connect import Worker, read_properties
from gateway.log.attempt_records import AttemptRecord, Decision, encode_attempt_record
from gateway.log.base import NewRecord, Partition, TopicSpec
from gateway.log.kafka.log import KafkaLog
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import DeliveryId, EventId, ResponseExcerpt, Result
from tests.builders import an_event
from tests.conftest import start_kafka
from tests.gateway_process import free_ports

CONNECT = Path(__file__).parent.parent.parent / "deploy" / "connect"
SINKS = ("clickhouse", "opensearch")
KINDS = ("events", "attempts")
FIELDS = {
    "events": ("body", "id", "source", "type", "received", "key", "query", "headers"),
    "attempts": ("body", "event_id", "type", "attempt", "headers"),
}
RECORD = ("topic", "partition", "offset", "stored_at")
WRITE_TIMEOUT = 240.0
"""Seconds for a worker to start and to write: a busy machine takes its time."""

pytestmark = pytest.mark.timeout(900)  # where CI has to fetch Kafka Connect first

PUSH = an_event(
    id="evt_1",
    headers={"Content-Type": "application/json", "X-GitHub-Event": "push"},
    body=b'{"ref":"refs/heads/main","n":1}',
)
KEYED = an_event(id="evt_2", key="007", query="a=1&b=%20", body=bytes(range(256)))
EMPTY = an_event(id="evt_3", type="ping", body=b"")
NOT_OURS = NewRecord(key=b"somebody", value=b"else's", headers=[])
EVENTS = (PUSH, KEYED, EMPTY)


def an_attempt(id: str, **fields: Any) -> AttemptRecord:  # noqa: A002 - what it is
    known: dict[str, Any] = {
        "event_id": EventId(id),
        "delivery_id": DeliveryId("dlv_1"),
        "source": "github",
        "type": "push",
        "route": "build",
        "destination": "ci",
        "received_at": 1764558645.25,
        "number": 1,
        "at": 1764558646.5,
        "seconds": 0.25,
        "result": Result.SUCCESS,
        "decision": Decision.DELIVERED,
        "status": 200,
        "method": "POST",
        "host": "ci.example.com",
    }
    return AttemptRecord(**known | fields)


DELIVERED = an_attempt("evt_1")
FAILED = an_attempt(
    "evt_2",
    number=3,
    result=Result.SERVER_ERROR,
    decision=Decision.RETRY,
    status=503,
    response=ResponseExcerpt(
        headers=((b"Server", b"nginx"), (b"Retry-After", b"9")), are_headers_cut=False, body=b"busy", is_body_cut=False
    ),
)
ATTEMPTS = (DELIVERED, FAILED)


def records(kind: str) -> list[NewRecord]:
    """Return what a topic gets, another program's record first: what it lacks, those after it have all the same."""
    if kind == "attempts":
        return [NOT_OURS, *map(encode_attempt_record, ATTEMPTS)]
    return [NOT_OURS, *[NewRecord(key=event_key(each), value=each.body, headers=encode_event(each)) for each in EVENTS]]


Row = dict[str, str]


@pytest.fixture(scope="module")
def written(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[Row]]:
    """Return the rows that each connector wrote, by its name such as "clickhouse-events"."""
    prefix, folder = f"t{uuid4().hex[:12]}.", tmp_path_factory.mktemp("connect")
    topics = {"events": f"{prefix}events.github", "attempts": f"{prefix}attempts"}
    asyncio.run(_append(kafka, topics))
    names = [f"{sink}-{kind}" for sink in SINKS for kind in KINDS]
    worker = start_kafka(
        lambda: Worker.run(
            folder, _worker(kafka, folder), [_tested(name, topics[name.split("-")[1]], folder) for name in names]
        )
    )
    expected = {name: len(records(name.split("-")[1])) for name in names}

    def rows(name: str) -> list[Row]:
        file = folder / f"{name}.txt"
        return list(parsed(file.read_bytes().decode(), FIELDS[name.split("-")[1]])) if file.exists() else []

    try:
        worker.wait_until(lambda: all(len(rows(name)) >= count for name, count in expected.items()), WRITE_TIMEOUT)
    finally:
        worker.stop()
    found = {name: rows(name) for name in names}
    assert {name: len(each) for name, each in found.items()} == expected
    return found


async def _append(kafka: str, topics: Mapping[str, str]) -> None:
    log = await KafkaLog.open(kafka)
    try:
        await log.create([TopicSpec(name=name, partitions=1, retention=None) for name in topics.values()])
        for kind, topic in topics.items():
            await log.append_in_order(Partition(topic, 0), records(kind))
    finally:
        await log.close()


def _worker(kafka: str, folder: Path) -> dict[str, str]:
    [port] = free_ports(1)
    properties = read_properties(CONNECT / "worker.properties")
    del properties["plugin.path"]  # all of it is on the path of classes
    return properties | {
        "bootstrap.servers": kafka,
        "offset.storage.file.filename": str(folder / "offsets"),
        "listeners": f"http://127.0.0.1:{port}",
    }


def _tested(name: str, topic: str, folder: Path) -> dict[str, str]:
    """Return a connector's settings with the file sink instead of the vendor's, and one topic."""
    kept = re.compile(r"name|tasks\.max|transforms.*|(?:key|value|header)\.converter")
    given = read_properties(CONNECT / f"{name}.properties")
    properties = {key: value for key, value in given.items() if kept.fullmatch(key)} | {
        "connector.class": "org.apache.kafka.connect.file.FileStreamSinkConnector",
        "topics": topic,
        "file": str(folder / f"{name}.txt"),
    }
    if given["value.converter"].endswith("ByteArrayConverter"):
        properties["transforms"] += ",shown"
        properties["transforms.shown.type"] = "org.apache.kafka.connect.transforms.Cast$Value"
        properties["transforms.shown.spec"] = "body:string"
    return properties


def parsed(text: str, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the records of a file sink, each as Java shows a Struct: the fields that it has, in their order."""
    for record in re.findall(r"Struct\{(.*?)\}\n", text, re.DOTALL):
        parts = re.split(rf"(?:^|,)({'|'.join((*fields, *RECORD))})=", record)
        yield dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("sink", SINKS)
def test_an_event_arrives_with_what_its_headers_say_and_its_body(
    written: Mapping[str, Sequence[Row]], sink: str
) -> None:
    for event, row in zip(EVENTS, written[f"{sink}-events"][1:], strict=True):
        assert (row["id"], row["source"], row["type"]) == (event.id, event.source, event.type)
        assert float(row["received"]) == pytest.approx(event.received_at, abs=1e-6)
        assert row.get("key") == event.key
        assert row.get("query", "") == event.query
        assert row["headers"] == "\r\n".join(f"{name.decode()}: {value.decode()}" for name, value in event.headers)
        assert row["body"] == _shown(event.body, sink)


@pytest.mark.parametrize("sink", SINKS)
def test_an_attempt_arrives_with_its_event_and_what_was_answered(
    written: Mapping[str, Sequence[Row]], sink: str
) -> None:
    for attempt, row in zip(ATTEMPTS, written[f"{sink}-attempts"][1:], strict=True):
        assert (row["event_id"], row["type"]) == (attempt.event_id, attempt.type)
        told = json.loads(row["attempt"])
        assert (told["route"], told["result"], told["n"]) == (attempt.route, attempt.result, attempt.number)
        assert row.get("headers") == (None if attempt.response is None else "Server: nginx\r\nRetry-After: 9")
        assert row["body"] == _shown(b"" if attempt.response is None else attempt.response.body, sink)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_which_record_it_is(written: Mapping[str, Sequence[Row]], sink: str, kind: str) -> None:
    rows = written[f"{sink}-{kind}"]
    assert len({row["topic"] for row in rows}) == 1
    assert [(row["partition"], row["offset"]) for row in rows] == [("0", str(n)) for n in range(len(rows))]
    assert all(row["stored_at"] for row in rows)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_another_program_holds_nothing_up(
    written: Mapping[str, Sequence[Row]], sink: str, kind: str
) -> None:
    first, *_ = written[f"{sink}-{kind}"]
    assert first["body"] == _shown(NOT_OURS.value, sink)
    assert set(first) - {"body", *RECORD} == ({"event_id"} if kind == "attempts" else set())


# ---- What the settings and the schemas name ----


COLUMN = re.compile(r"^    (\w+) [A-Z][^ (]*(?:\([^)]*\))? (DEFAULT|MATERIALIZED)", re.MULTILINE)
KNOWN = {
    # Of src/main/java/com/clickhouse/kafka/connect/sink/ClickHouseSinkConfig.java, 1.5.0.
    "clickhouse": {"hostname", "port", "ssl", "database", "username", "password", "topic2TableMap"},
    # Of docs/opensearch-sink-connector-config-options.rst and OpenSearchSinkConnectorConfig.java, 4.0.
    "opensearch": {
        "connection.url",
        "connection.username",
        "connection.password",
        "data.stream.enabled",
        "data.stream.prefix",
        "data.streams.existing.index.template.name",
        "schema.ignore",
        "key.ignore",
        "key.ignore.id.strategy",
        "behavior.on.version.conflict",
        "behavior.on.malformed.documents",
    },
}
OF_CONNECT = re.compile(
    r"name|connector\.class|tasks\.max|topics(\.regex)?|errors\.tolerance|transforms(\..*)?|(key|value|header)\.converter"
)


def _fields(name: str) -> set[str]:
    """Return the fields that a connector's transforms make."""
    properties = read_properties(CONNECT / f"{name}.properties")
    order = properties["transforms"].split(",")
    assert {key.split(".")[1] for key in properties if key.startswith("transforms.")} == set(order)
    made = [value for key, value in properties.items() if re.fullmatch(r"transforms\.\w+\.fields", key)]
    made += [value for key, value in properties.items() if re.fullmatch(r"transforms\.record\.\w+\.field", key)]
    return {*made, properties["transforms.body.field"]} - {"key" if "attempts" in name else ""}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_its_column_and_every_column_its_field(kind: str) -> None:
    """What a table has no column for, ClickHouse's sink leaves out without a word."""
    sql = (CONNECT / "clickhouse.sql").read_text()
    [table] = re.findall(rf"CREATE TABLE IF NOT EXISTS webhooks\.{kind}\n\((.*?)^\)", sql, re.MULTILINE | re.DOTALL)
    columns = COLUMN.findall(table)
    # One without a default would hold up a record that lacks it, and all behind it.
    assert len(columns) == len(re.findall(r"^    (?!INDEX)\w+ ", table, re.MULTILINE))
    assert {name for name, how in columns if how == "DEFAULT"} == _fields(f"clickhouse-{kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_in_the_template_of_its_stream(kind: str) -> None:
    template = json.loads((CONNECT / f"opensearch-{kind}.json").read_text())
    mapped = template["template"]["mappings"]["properties"]
    # The sink adds @timestamp, the pipeline what an attempt's JSON has.
    assert mapped.keys() - {"@timestamp", "told"} == _fields(f"opensearch-{kind}")
    settings = read_properties(CONNECT / f"opensearch-{kind}.properties")
    assert settings["data.streams.existing.index.template.name"] == f"webhook-{kind}"
    [pattern] = template["index_patterns"]
    topic = Topics().attempts if kind == "attempts" else Topics().events("github")
    assert re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), f"{settings['data.stream.prefix']}-{topic}")


def test_what_the_pipeline_reads_of_an_attempt_is_mapped() -> None:
    told = json.loads((CONNECT / "opensearch-attempts.json").read_text())["template"]["mappings"]["properties"]["told"]
    record = dict(encode_attempt_record(FAILED).headers)
    assert told["properties"].keys() <= json.loads(record["gw_attempt"]).keys()


@pytest.mark.parametrize("name", [f"{sink}-{kind}" for sink in SINKS for kind in KINDS])
def test_a_setting_is_one_of_connect_or_of_the_vendors_sink(name: str) -> None:
    sink, _, kind = name.partition("-")
    properties = read_properties(CONNECT / f"{name}.properties")
    assert {key for key in properties if not OF_CONNECT.fullmatch(key)} == KNOWN[sink]
    assert re.fullmatch(r"\$\{file:/etc/kafka-connect/secrets\.properties:\w+\}", _password(properties))
    topic = Topics().attempts if kind == "attempts" else Topics().events("github")
    if "topics.regex" in properties:
        assert re.fullmatch(properties["topics.regex"], topic)
    else:
        assert topic in properties["topics"].split(",")


def _password(properties: Mapping[str, str]) -> str:
    return properties.get("password") or properties["connection.password"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_topic_has_its_table_under_its_own_name(kind: str) -> None:
    """ClickHouse knows a repeated insert by topic, partition and offsets: of two topics with one name, one is lost."""
    properties = read_properties(CONNECT / f"clickhouse-{kind}.properties")
    tables = dict(each.split("=") for each in properties["topic2TableMap"].split(","))
    assert list(tables) == properties["topics"].split(",")
    assert set(tables.values()) == {kind}
    assert not any("Router" in value for value in properties.values())


def _shown(body: bytes, sink: str) -> str:
    return base64.b64encode(body).decode() if sink == "clickhouse" else body.decode("utf-8", "replace")
