"""`python -m headsink` is the command line."""

from headsink.cli import main

main()
