"""The console: pages over the functions of the API, for people, at `/ui`."""
