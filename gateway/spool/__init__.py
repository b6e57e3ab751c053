"""Events on this machine's disk while the log takes none: an ingress never closes.

`Spool` is all that the process needs of it. `appends.py` decides for each event whether it goes to the log or to the
spool, by what `waiting.py` knows of both. `store.py` is the file. `mover.py` moves what is in it to the log, with
`topic_move.py` for one topic, and `stored_events.py` finds what the log has already.
"""
