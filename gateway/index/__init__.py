"""A searchable index of what the log has: one SQLite file, which can be deleted and rebuilt at any moment.

index               all that others need of it
reader              reads the log in rounds
writer              stores what was read: events (`segments`, `terms`), `deliveries`, `duplicates`, `partitions`
settlement, lives   how far an event is; which life of a delivery a record or an attempt is of
query               the query language; `conditions`, `candidates` and `delivery_query` make SQL of queries
search              runs them; `reading` does so from another process
notes               how current the file is, by what `leader_clocks` knows
traffic_schema      what is counted by time; `traffic_counts` writes it, `traffic` reads it, `tallies` adds it up
hidden              what the rules hide, and so isn't found either
"""
