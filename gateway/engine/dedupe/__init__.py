"""Which events are duplicates of earlier ones, by their identities."""
