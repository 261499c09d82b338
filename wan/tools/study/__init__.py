"""The study of which blocks to keep: rules beside those of `nabla`, what each changes, and the tables of it."""
