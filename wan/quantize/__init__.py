"""Weights of linear layers in fewer bits."""
