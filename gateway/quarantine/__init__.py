"""Requests that verification refused, kept so that they can be verified again: their records, and how many are kept."""
