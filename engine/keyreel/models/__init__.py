"""The built-in model, and models that one command installs."""
