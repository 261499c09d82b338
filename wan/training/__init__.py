"""Training of Wan2.1 models, and the data set and measurements of the small one that ships."""
