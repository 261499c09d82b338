"""Where models lie, and what a run takes of memory."""
