"""The central webhook entrypoint: verify, acknowledge once durable, route, retry."""
