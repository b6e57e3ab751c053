"""Who sent a request: signature schemes, providers as data, handshakes."""
