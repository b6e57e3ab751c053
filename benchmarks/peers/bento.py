"""Bento, the open fork of Benthos: one process from HTTP to Kafka, and one from Kafka to HTTP.

https://warpstreamlabs.github.io/bento/docs/components/inputs/http_server
https://warpstreamlabs.github.io/bento/docs/components/outputs/kafka_franz
"""

import json

from benchmarks.payload import SECRET
from benchmarks.peers.build import built
from benchmarks.peers.peer import Peer, Setting
from benchmarks.processes import Measured, MeasuredProcess, Together
from tests.gateway_process import free_ports

IN_FLIGHT = 64
"""Events in flight: as many as the sender has connections, and as many as its HTTP output takes by default."""
VERIFY = f"""\
let signature = "sha256=" + content().hash("hmac_sha256", {json.dumps(SECRET)}).encode("hex")
root = if metadata("X-Hub-Signature-256").or("") != $signature {{ throw("invalid signature") }}
"""
"""In Bloblang, where a mapping that throws leaves the message as it is, with an error."""


def _start(setting: Setting) -> Measured:
    """Start both. What it appends it appends with zstd, and each event in a request of its own, unless several wait."""
    binary = str(built("bento"))
    receiving, delivering = free_ports(2)
    quiet = {"logger": {"level": "WARN"}, "metrics": {"none": {}}}
    http_to_kafka = quiet | {
        "http": {"enabled": False},
        "input": {
            "http_server": {
                "address": f"127.0.0.1:{receiving}",
                "path": "/in/github",
                "sync_response": {"status": '${! @status.or("200") }'},
            }
        },
        "pipeline": {
            "processors": [
                {"mapping": VERIFY},
                {
                    "catch": [
                        {"mapping": 'meta status = "401"'},
                        {"sync_response": {}},
                        {"mapping": "root = deleted()"},
                    ]
                },
            ]
        },
        "output": {
            "kafka_franz": {
                "seed_brokers": [setting.servers],
                "topic": setting.topic,
                "compression": "zstd",
                "max_in_flight": IN_FLIGHT,
            }
        },
    }
    kafka_to_http = quiet | {
        "http": {"address": f"127.0.0.1:{delivering}"},
        "input": {
            "kafka_franz": {
                "seed_brokers": [setting.servers],
                "topics": [setting.topic],
                "consumer_group": "bento",
                "fetch_max_wait": "100ms",
            }
        },
        "output": {
            "http_client": {
                "url": setting.url,
                "headers": {"Content-Type": "application/json"},
                "max_in_flight": IN_FLIGHT,
                "retries": 3,
            }
        },
    }
    processes = []
    for name, configuration, port in (
        ("bento-in", http_to_kafka, receiving),
        ("bento-out", kafka_to_http, delivering),
    ):
        file = setting.folder / f"{name}.json"
        file.write_text(json.dumps(configuration))
        command = [binary, "-c", str(file)]
        processes.append(MeasuredProcess(name, command, setting.folder, port=port))
    return Together("peer-bento", processes)


PEER = Peer(
    name="Bento 1.20",
    about="two processes; retries, at least once; a mapping verifies; no ids, no rules by event",
    start=_start,
)
