"""Training of Wan2.1 models: data, objectives, loops and what measures their results."""
