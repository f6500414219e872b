"""More than one machine: videos indexed on a Ray cluster."""
