"""Serving engines that run a plan."""
