"""The embedded log: one SQLite file (WAL, `synchronous=FULL`), for a laptop or a single machine. No Kafka needed.

    append ─▶ what one turn of the loop appends ─▶ queue ─▶ writer thread: all that waits, one statement, one fsync
                                                               │ one callback: futures resolved, records handed on
    fetch ◀─ buffer ◀─── at the tail: from memory ─────────────┘
                    ◀─── behind it: from the file, by the reader thread

Python's sqlite3 gives up the interpreter lock for every row and must win it back from the event loop. While the loop is
busy that takes up to a switch interval (5 ms) each time: `executemany` was seen to store 28 rows/s. So a group of
appends is one statement with two parameters, the lengths as JSON and all the bytes joined, and a read is one row alike.

Each topic has one partition, since more would serve only more processes, and the file is one process's. For the same
reason a group has a single member. Other processes (the command line) may append and read beside the owner.

    log         the contract, over the writer, a reader thread and consumers
    writer      the thread that alone writes
    consumer    what is handed on from memory, and read from the file
    statements  what the file holds, and how it is asked and changed
    file        the file's connections and its clock
    lock        whose it is
    presence    whether it is still the file that was opened
    backup      a copy of it
    restore     a copy in its place
"""
