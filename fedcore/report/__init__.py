"""Reports: one self-contained HTML page for a run, one for several runs side by side."""
from fedcore.report.comparison import comparison_rows, write_comparison
from fedcore.report.page import write_report

__all__ = ["comparison_rows", "write_comparison", "write_report"]
