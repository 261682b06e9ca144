"""A report: one page of HTML, for itself and offline, that shows what wrote the answers of a model, and lets one try.

`report` makes a `Report` of some images, and of the classes or texts that they are scored with.
"""

from vitdecomp_lens.report.making import report
from vitdecomp_lens.report.page import Report

__all__ = ["Report", "report"]
