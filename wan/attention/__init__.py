"""The sparse attention in a transformer."""
