"""Utilities for every package: files, progress bars, terminal output, statistics, devices."""
