"""Routes with an order key: one delivery of a key at a time."""
