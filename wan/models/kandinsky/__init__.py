"""Kandinsky-5: text and picture to video."""
