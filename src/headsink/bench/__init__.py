"""Measurements of headsink itself, side by side with what one would use otherwise."""
