"""routes.yaml: what may be written, how it is read, and which routes match an event."""
