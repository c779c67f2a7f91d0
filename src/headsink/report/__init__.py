"""A census as a page and as pictures; a comparison as a page."""

from headsink.report.comparison import write_comparison, write_comparison_pictures
from headsink.report.page import write_report

__all__ = ["write_comparison", "write_comparison_pictures", "write_report"]
