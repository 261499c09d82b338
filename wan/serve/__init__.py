"""Videos made for others: jobs that survive, the processes that make them, an HTTP API, and a web page."""
