"""The gateway itself, with ten routes of which one matches."""

from benchmarks.peers.peer import Peer, Setting
from benchmarks.processes import Measured, gateway


def _start(setting: Setting) -> Measured:
    port = int(setting.url.partition("//")[2].partition("/")[0].rpartition(":")[2])
    return gateway("peer-gateway", setting.folder, log=f"kafka://{setting.servers}", destination=port)


PEER = Peer(
    name="gateway",
    about="one process; all that it promises: ids, headers, rules, retries, dead letters, order of commits, metrics",
    start=_start,
)
