"""What an evaluation found: its tables of counts (csv_files), all of its files (saving), and in print (tables)."""

from exp.evaluation.results.csv_files import (
    case_csv,
    confusion_csv,
    images_csv,
    load_confusion,
    load_result,
    result_csv,
)
from exp.evaluation.results.saving import (
    CALIBRATION,
    COMPARISON,
    IMAGES,
    finite_or_null,
    report_results,
    save_results,
    shared_context,
)
from exp.evaluation.results.tables import (
    LOSING_HEADER,
    format_comparisons,
    format_results,
    format_scores,
)

__all__ = [
    "CALIBRATION",
    "COMPARISON",
    "IMAGES",
    "LOSING_HEADER",
    "case_csv",
    "confusion_csv",
    "finite_or_null",
    "format_comparisons",
    "format_results",
    "format_scores",
    "images_csv",
    "load_confusion",
    "load_result",
    "report_results",
    "result_csv",
    "save_results",
    "shared_context",
]
