"""Delivery: pure decisions, the loop that acts on them, and the client that makes one attempt."""
