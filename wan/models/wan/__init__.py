"""Wan: videos of text, and of pictures or another video beside it."""
