"""Where keyreel runs: devices, models, and the runtimes that run them."""
