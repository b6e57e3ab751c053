"""A live list on the terminal that it is started on: `r` tells that it was pressed, and delivers."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from gateway.ops.live_display import LiveDisplay
from gateway.ops.live_list import Listed

NEW = Listed(id="", at=time.time(), source="stripe", type="invoice.paid", destination="billing", status="pending")


async def main(how: str) -> None:
    coming: asyncio.Queue[Listed] = asyncio.Queue()
    resent: list[str] = []
    for number in range(30):
        coming.put_nowait(replace(NEW, id=f"dlv_{number}", source=f"shop{number}"))
    coming.put_nowait(replace(NEW, id="dlv_hostile", source="\x1b[2Jred", type="push", destination="ci"))

    async def items() -> AsyncIterator[Listed]:
        if how == "ends":
            return
        if how == "fails":
            raise ConnectionError("the stream broke")
        while True:
            yield await coming.get()

    async def resend(item: Listed) -> str:
        resent.append(item.id)
        if item.source == "shop29":
            raise ConnectionError("connection refused")
        coming.put_nowait(replace(item, status="delivered", detail="200 in 3 ms"))
        return f"200, number {len(resent)}"

    await LiveDisplay(items(), resend).run()


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except (ConnectionError, KeyboardInterrupt) as error:
        print(f"ended by {type(error).__name__} {error}")  # noqa: T201 - what the test looks for
    else:
        print("ended")  # noqa: T201 - the same
