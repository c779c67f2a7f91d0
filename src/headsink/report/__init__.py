"""A census as a page and as pictures; a comparison as a page."""

from headsink.report.comparison import write_comparison
from headsink.report.page import write_pictures, write_report

__all__ = ["write_comparison", "write_pictures", "write_report"]
