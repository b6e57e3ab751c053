"""The HTTP API at the admin address: what operators and their programs see and do, as JSON."""
