"""`python -m headsink` is the command line."""

from headsink.cli.main import main

main()
