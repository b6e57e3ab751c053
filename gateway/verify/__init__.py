"""Verification of senders: signature schemes, providers as data, handshakes."""
