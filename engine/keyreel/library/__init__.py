"""Many videos: added, kept, searched; one folder or a bucket."""
