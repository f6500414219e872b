"""`python -m keyreel`."""

from keyreel.cli import main

main()
