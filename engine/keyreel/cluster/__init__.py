"""Indexes, searches and serves on a Ray cluster of several machines."""
