"""More than one machine: videos indexed, searched and served on a Ray cluster."""
