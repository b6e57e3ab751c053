"""The durable log: its contract, its records and topics, and its two implementations."""
