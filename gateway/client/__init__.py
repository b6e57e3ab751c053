"""One attempt of one delivery: the request, its connection, and the response."""
