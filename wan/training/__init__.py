"""Training of any family's transformer, and the data set and measurements of the small one that ships."""
