"""Outputs: reel, key-frame pictures, storyboard, thumbnails, interchange files."""
