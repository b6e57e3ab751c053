"""Delivery: pure decisions, and the loops that act on them."""
