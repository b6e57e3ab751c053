"""Indexes a log in processes that are killed at some statement each, until one comes to its end.

python -m tests.index.kills LOG INDEX PREFIX SEED — prints how many were killed.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from random import Random

from gateway.index import reader
from gateway.index.index import open_index
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import Topics


async def index_until(log_path: Path, path: Path, topics: Topics, statements: int) -> None:
    """Index everything; die with the statement of that number."""
    left = statements

    def count(_statement: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    log = await EmbeddedLog.open(log_path, owner=False)
    async with open_index(path, log, topics) as index:
        index._file.writer.set_trace_callback(count)
        await index.refresh()
    await log.close()


def main() -> None:
    log_path, path, prefix, seed = sys.argv[1:]
    chosen = Random(int(seed))
    reader.COMMIT_EVERY = 0.0
    reader.STEP_BYTES = 1
    kills = 0
    while True:
        statements = chosen.randrange(1, 40 + 20 * kills)
        child = os.fork()
        if child == 0:
            asyncio.run(index_until(Path(log_path), Path(path), Topics(prefix), statements))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(kills)  # noqa: T201 - a script's result
            sys.exit(os.WEXITSTATUS(status))
        kills += 1


if __name__ == "__main__":
    main()
