"""The embedded log: one SQLite file (WAL, `synchronous=FULL`), for a laptop or a single machine. No Kafka needed.

    append ─▶ group: appends of one loop iteration ─▶ queue ─▶ writer thread: all groups in one statement, one fsync
                                                                 │ one callback: futures resolved, records passed on
    fetch ◀─ buffer ◀─── at the tail: from memory ───────────────┘
                    ◀─── behind it: from the file, by the reader thread

Python's sqlite3 releases the interpreter lock for every row and must reacquire it from the event loop. While the loop
is busy that takes up to a switch interval (5 ms) each time: `executemany` was measured at 28 rows/s. So a group of
appends is one statement with two parameters, the lengths as JSON and all the bytes joined, and a read returns one such
row.

Each topic has one partition, since more would only serve more processes, and the file belongs to one process. For the
same reason a group has a single member. Other processes (the command line) may append and read beside the owner.

    log         the contract, over the writer, a reader thread and consumers
    writer      the only thread that writes
    consumer    records from memory at the tail, and from the file behind it
    statements  the file's schema, and its SQL
    sweep       deletes what is older than its retention, in steps
    file        the file's connections and its clock
    lock        the owner's lock
    file_check  whether it is still the file that was opened
    backup      copies it
    restore     replaces it by a copy
"""
