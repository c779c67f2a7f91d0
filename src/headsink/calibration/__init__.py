"""Calibration: scorer weights and a budget allocation that turn documents into a plan."""
