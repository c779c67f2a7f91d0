"""Calibration: from documents to importance scores, budget allocation and a plan."""
