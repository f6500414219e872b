"""From a video to batches of RGB frames with their times."""
