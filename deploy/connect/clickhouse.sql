-- Where deploy/connect/clickhouse-*.properties write to: events and attempts, a row for each record of the log.
--
--   clickhouse-client --multiquery < deploy/connect/clickhouse.sql
--
-- Every column has a default and nothing that is computed can fail, so that no record, not even another program's in one
-- of these topics, holds up those behind it. Kafka Connect may write a record twice: a row is one record by topic,
-- partition and offset, and merges keep one of its copies. Until then FINAL shows one alone.
CREATE DATABASE IF NOT EXISTS webhooks;

CREATE TABLE IF NOT EXISTS webhooks.events
(
    topic LowCardinality(String) DEFAULT '',
    partition Int32 DEFAULT 0,
    offset Int64 DEFAULT 0,
    stored_at DateTime64(3, 'UTC') DEFAULT toDateTime64(0, 3, 'UTC'), -- when the log stored it
    id String DEFAULT '', -- several records may share it: duplicates
    source LowCardinality(String) DEFAULT '',
    type LowCardinality(String) DEFAULT '',
    key String DEFAULT '', -- the order key, if the source has one
    received String DEFAULT '', -- Unix seconds
    received_at DateTime64(6, 'UTC') MATERIALIZED toDateTime64OrZero(received, 6, 'UTC'),
    query String DEFAULT '', -- of the request
    headers String DEFAULT '' CODEC(ZSTD(3)), -- of the request, `name: value`, joined by CRLF
    body String DEFAULT '' CODEC(ZSTD(3)), -- byte for byte
    INDEX by_id id TYPE bloom_filter GRANULARITY 4,
    INDEX by_key key TYPE bloom_filter GRANULARITY 4,
    INDEX by_word body TYPE tokenbf_v1(32768, 3, 0) GRANULARITY 1
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(stored_at)
ORDER BY (source, type, stored_at, topic, partition, offset)
TTL toDateTime(stored_at) + INTERVAL 90 DAY
SETTINGS ttl_only_drop_parts = 1;

CREATE TABLE IF NOT EXISTS webhooks.attempts
(
    topic LowCardinality(String) DEFAULT '',
    partition Int32 DEFAULT 0,
    offset Int64 DEFAULT 0,
    stored_at DateTime64(3, 'UTC') DEFAULT toDateTime64(0, 3, 'UTC'),
    event_id String DEFAULT '',
    type LowCardinality(String) DEFAULT '', -- of the event
    attempt String DEFAULT '' CODEC(ZSTD(3)), -- JSON: what follows is of it, and more is in it
    source LowCardinality(String) MATERIALIZED JSONExtractString(attempt, 'source'),
    route LowCardinality(String) MATERIALIZED JSONExtractString(attempt, 'route'),
    destination LowCardinality(String) MATERIALIZED JSONExtractString(attempt, 'destination'),
    delivery_id String MATERIALIZED JSONExtractString(attempt, 'delivery'),
    number UInt32 MATERIALIZED JSONExtractUInt(attempt, 'n'),
    began_at DateTime64(3, 'UTC') MATERIALIZED toDateTime64OrZero(toString(JSONExtractFloat(attempt, 'at')), 3, 'UTC'),
    seconds Float64 MATERIALIZED JSONExtractFloat(attempt, 's'),
    result LowCardinality(String) MATERIALIZED JSONExtractString(attempt, 'result'),
    decision LowCardinality(String) MATERIALIZED JSONExtractString(attempt, 'decision'), -- what followed
    status UInt16 MATERIALIZED JSONExtractUInt(attempt, 'status'), -- 0 without a response
    detail String MATERIALIZED JSONExtractString(attempt, 'detail'),
    headers String DEFAULT '' CODEC(ZSTD(3)), -- of the response, masked; successes have none
    body String DEFAULT '' CODEC(ZSTD(3)), -- the beginning of the response's, masked
    INDEX by_event event_id TYPE bloom_filter GRANULARITY 4
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(stored_at)
ORDER BY (stored_at, topic, partition, offset)
TTL toDateTime(stored_at) + INTERVAL 90 DAY
SETTINGS ttl_only_drop_parts = 1;
