"""The senders' side: requests are received, verified, and acknowledged once they are durable.

listener      accepts connections, opens them (`tls`, `proxy_protocol`), and evicts and closes them
server        a connection: deadlines, sizes, and errors before there is a request
ingress       a request, from its head to its response; `endpoint` is its source
body          reads its body, as far as `body_memory` has room; 408, 413 and 503 are decided here
admission     a source's own `rate` and `concurrent`: 429
key_fetcher   fetches the keys that it names, within `key_budget` and `fetch_turns`
event_writer  stores its events; `destination_responses` waits for a destination's response
responses     what senders get, with `Retry-After`
quarantine    what is kept of those that are refused
"""
