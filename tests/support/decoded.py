"""Families that the compiled step decodes."""

from families import FAMILIES

DECODED = tuple(family for family in FAMILIES if family != "gpt-oss")
