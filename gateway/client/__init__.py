"""One attempt of one delivery: the request, its connection, and the response.

client            makes the attempt, over `connections` that speak HTTP/1.1 (`http1`)
request           builds it, without I/O
resolver, egress, oauth    a name's addresses, which of them may be connected to, and access tokens
retry_after       how long a destination asks us to wait
observation       what is seen of an attempt besides its result; `response_excerpt` what is kept, after `masking`
echoes            hides in other texts what people may not see of an event
"""
