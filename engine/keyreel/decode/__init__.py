"""Decodes videos to batches of RGB frames with their times."""
