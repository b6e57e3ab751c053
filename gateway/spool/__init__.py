"""Events on this machine's disk while the log accepts none, so that the ingress goes on accepting them.

`spool.py` is what the ingress uses, and decides for each event whether it goes to the log or to the spool, by what
`waiting.py` knows of both. `store.py` is the file, `records.py` what a record in it has; `counting.py` counts the
records. `orphans.py` finds the spools of processes that no longer exist, and moves them, too. `report.py` is for
operators.

`mover.py` moves the file's records to the log, by what `topic_move.py` knows of one topic, with `log_appends.py` for
one partition; `fair_turns.py` says which topic is next, `log_probe.py` since when the log answers, and
`stored_events.py` finds what the log has already.
"""
