"""A census as a page and as pictures."""

from headsink.report.page import write_pictures, write_report

__all__ = ["write_pictures", "write_report"]
