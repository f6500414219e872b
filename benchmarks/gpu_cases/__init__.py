"""What `python -m benchmarks.gpu` measures, a module a subject."""
