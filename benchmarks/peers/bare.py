"""aiohttp and aiokafka on uvloop, as in their own examples: `benchmarks/bare_pipeline.py`."""

from benchmarks.peers.peer import Peer, Setting
from benchmarks.processes import Measured, bare_pipeline


def _start(setting: Setting) -> Measured:
    return bare_pipeline(
        "peer-bare", setting.folder, servers=setting.servers, topic=setting.topic, destination=setting.url
    )


PEER = Peer(
    name="aiohttp + aiokafka",
    about="one process; no ids, headers, rules, retries; what fails is lost",
    start=_start,
)
