"""Calibration: scorer weights, budget allocation and local search that turn documents into a plan."""
