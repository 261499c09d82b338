"""Wan: text to video."""
