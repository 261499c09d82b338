"""A model over several processes."""
