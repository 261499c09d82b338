"""Formats of files of weights, by the endings of their names."""

SAFETENSORS, GGUF = ".safetensors", ".gguf"
