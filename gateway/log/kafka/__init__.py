"""The log on Kafka: the only user of aiokafka, whose peculiarities don't leave this package.

It adds what aiokafka (0.14) doesn't guarantee: a deadline for every append, fetch, commit and close; errors of
listeners are raised; commits on revocation and on close; recovery when one of its background tasks has died; and no
metadata request ever creates a topic with the broker's defaults.

    log             the contract, over an appender, consumers and a cluster
    appender        records → brokers: batches, deadlines, replaces a producer that is stuck
    consumer        brokers → records: groups, assignments, commits, replaces a consumer that has died
    cluster         queries and administration: topics, offsets, groups
    scanner         reads a range of a partition, for jobs and commands
    commits         what the metadata of a commit says
    topic_metadata  topics' ids
    connection      how brokers are reached, how aiokafka's clients are stopped, and which of its log lines pass
    topic_settings  a topic's specification as Kafka settings, and what is wrong with existing ones
    broker_clock    the brokers' time
    errors          aiokafka's errors → ours
"""
