"""A video file becomes frames; frames become compressed bytes."""
