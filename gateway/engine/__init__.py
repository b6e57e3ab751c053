"""Delivery: pure decisions, and the loops that act on them.

worker               the delivering side of a process: a router, and a member for each ordered route
router               matches each event once (`deliveries_of_event`), and takes retries from the tiers (`tiers`)
group_member         a member of a group: its partitions, and when what is done is committed (`committer`)
partition_tracker    the pending records of a partition; `commit_progress`, `memory_shares`
event_topics         which topics to read; `unavailable_partitions`, `undecodable_records`: what can't be read
successor_writer     records that continue a delivery; `alternate_partitions` where their own takes none

delivery/            when a delivery is attempted, and what follows
ordered/             routes with an order key
dedupe/              which events are duplicates
control/, jobs/      what operators command, and what carries it out
"""
