"""One attempt of one delivery: the request, the connection that carries it, and what came back."""
