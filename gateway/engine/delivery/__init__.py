"""Deliveries: when each is attempted, and what follows from the result."""
