"""The command line: commands whose options are fields of config. Data goes to stdout, everything else to stderr."""

from keyreel.cli.videos import main

__all__ = ["main"]
