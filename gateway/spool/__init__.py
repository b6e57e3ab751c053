"""Events on this machine's disk while the log accepts none: an ingress never closes.

`spool.py` is all that the process needs of it, and decides for each event whether it goes to the log or to the spool,
by what `waiting.py` knows of both. `store.py` is the file, `counting.py` counts what is in it when it is opened.
`mover.py` moves it to the log, by what `topic_move.py` knows of one topic, with `log_appends.py` for one partition;
`stored_events.py` finds what the log has already.
"""
