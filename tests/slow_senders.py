"""Senders that mean no good, in a process of their own: `python -m tests.slow_senders PORT COUNT KIND`.

held    each sends a forged head and a part of a large body, and nothing more
slow    two of five send a head a byte a second, two a forged head and then a part of a body, and one announces a body
        that is larger than any limit

They begin evenly over some seconds. Each waits until it is refused, and comes again after some seconds. Prints a line
once all of them have connected. They run while nobody else wants a processor: in the field they bring their own.
"""

import asyncio
import os
import resource
import sys
from contextlib import suppress
from itertools import count
from time import monotonic

HEAD = b"POST /in/github HTTP/1.1\r\nHost: gateway.test\r\nX-GitHub-Event: push\r\nX-GitHub-Delivery: d\r\n"
FORGED = HEAD + b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\nContent-Length: %d\r\n\r\n"
LARGE, TOO_LARGE = 900_000, 10**12  # bytes
PIECE = 4096  # bytes of a body that are sent
PIECES = (420_000, 420_000, 420_000, 20_000, 500)
"""Bytes after which senders leave off, by turns: 160 large ones fill a room of 64 MiB, the others what is left."""
PAUSE = 5.0
"""Seconds until one that was refused comes again, of `held` from when it came; all of them begin within as long."""


async def hold_open(port: int, size: int, *, length: int = LARGE) -> None:
    """Send so much of a body with a forged signature, wait for a response, and come again."""
    while True:
        began = monotonic()
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(FORGED % length + b"x" * size)
                await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()
        await asyncio.sleep(max(0.0, began + PAUSE - monotonic()))


async def _send_slowly(port: int, number: int) -> None:
    while True:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                kind = number % 5
                if kind < 2:
                    dripping = asyncio.create_task(_drip(writer))
                    try:
                        await reader.readuntil(b"\r\n\r\n")
                    finally:
                        dripping.cancel()
                else:
                    length = TOO_LARGE if kind == 4 else LARGE
                    writer.write(FORGED % length + b"x" * PIECE)
                    await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()
        await asyncio.sleep(PAUSE)


async def _drip(writer: asyncio.StreamWriter) -> None:
    for number in count():
        writer.write(HEAD[number : number + 1] or b"x")
        await asyncio.sleep(1.0)


async def main(port: int, senders: int, kind: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(senders):
            if kind == "held":
                tasks.create_task(hold_open(port, PIECES[number % len(PIECES)]))
            else:
                tasks.create_task(_send_slowly(port, number))
            await asyncio.sleep(PAUSE / senders)
        sys.stdout.write("connected\n")
        sys.stdout.flush()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
