"""What the bytes of a body mean: content codings, JSON, forms and XML, read within bounds. Nothing changes a body."""
