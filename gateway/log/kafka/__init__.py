"""The log on Kafka: the only user of aiokafka, whose habits stop here.

What aiokafka (0.14) does not promise, this package adds: a deadline for every append, fetch, commit and close;
listeners whose errors are heard; commits on revocation and on close; going on where one of its background tasks has
died; and never a topic that a metadata request made, with the broker's defaults.

    log         the contract, over an appender, consumers and a cluster
    appender    records → brokers: batches, deadlines, a new producer in the place of one that is stuck
    consumer    brokers → records: groups, assignments, commits, a new consumer in the place of one that is silent
    cluster     questions and orders to the brokers: topics, offsets, groups
    connection  how a broker is reached, how a client of aiokafka is let go, and which lines of its log are passed
    topics      what a topic has to be, in Kafka's settings
    clock       the brokers' time
    errors      aiokafka's errors → ours
"""
