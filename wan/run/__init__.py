"""One run, from a request to files."""
