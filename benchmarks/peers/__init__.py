"""Other ways from a sender to a destination through Kafka, beside the gateway's: `python -m benchmarks.peers`."""
