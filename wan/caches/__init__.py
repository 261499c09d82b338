"""Step caches: what blocks added in an earlier step, reused."""
