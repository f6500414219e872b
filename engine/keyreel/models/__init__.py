"""The built-in model, and the installation of others."""
