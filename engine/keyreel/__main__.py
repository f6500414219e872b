"""`python -m keyreel`."""

from keyreel.cli.videos import main

main()
