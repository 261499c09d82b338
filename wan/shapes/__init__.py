"""The data set of moving shapes, its measurements, and the small models that learn it."""
