"""The command line: a module for each group of commands. `main` is the entry."""
