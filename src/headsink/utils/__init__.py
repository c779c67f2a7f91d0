"""Files, progress bars, terminal output, statistics, devices: what every package may use."""
