"""Senders that mean no good, in a process of their own: `python -m tests.slow_senders PORT COUNT KIND`.

held    each sends a forged head and a part of a large body, and nothing more
large   two of three send a body that is too large: in chunks, of which more come until it is refused, or with its
        length, which is just above the limit, and all of it; the third announces one that is larger than any limit
slow    two of five send a head a byte a second, two a forged head and then a part of a body, and one is `large`: of
        fifty such, one sends chunks, one all of its body

They begin evenly over some seconds. Each waits until it is refused, and comes again after some seconds. Prints a line
once all of them have connected.

They have the lowest priority there is (SCHED_IDLE): they run while neither the gateway nor the good senders want a
processor. In the field they bring their own machines; here they would take up to half of the one that is measured, and
the test would tell how the kernel shares two cores among three processes, and not what the gateway does for whom. What
they make the gateway do, it does at its usual priority.
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
CHUNKED = HEAD + b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE, TOO_LARGE = 900_000, 10**12  # bytes
ABOVE = 1_000_000
"""Bytes of a body that is just above the limit, which is 982,028 with the head."""
GROWTH = 64 * 1024  # bytes of a chunk
GROWING = 50  # of so many in `slow` whose body is too large, one is in chunks, and one is sent in full
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


async def send_too_much(port: int, number: int, *, pause: float) -> None:
    """Send a body that is too large, by turns in one of three ways; come again once it is refused."""
    while True:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            refused = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            try:
                match number % 3:
                    case 0:
                        writer.write(CHUNKED)
                        while not refused.done():
                            writer.write(b"%x\r\n%b\r\n" % (GROWTH, b"x" * GROWTH))
                            await writer.drain()
                    case 1:
                        writer.write(FORGED % ABOVE)
                        for _ in range(0, ABOVE, GROWTH):  # refused or not
                            writer.write(b"x" * min(GROWTH, ABOVE))
                            await writer.drain()
                    case _:
                        writer.write(FORGED % TOO_LARGE + b"x" * PIECE)
                await refused
            finally:
                refused.cancel()
                await asyncio.wait([refused])
                writer.close()
        await asyncio.sleep(pause)


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
                    writer.write(FORGED % LARGE + b"x" * PIECE)
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
            elif kind == "large":
                tasks.create_task(send_too_much(port, number, pause=1.0))
            elif number % 5 == 4:
                tasks.create_task(send_too_much(port, min(number // 5 % GROWING, 2), pause=PAUSE))
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
