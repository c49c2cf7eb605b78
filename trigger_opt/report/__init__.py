"""Records in, one page a person reads out: `report.html` and `report.md` in the run folder. No torch, no network.

load        everything read from one run folder
words       figures and names as text, the same in both formats
answers     which completions are shown next to each other
remote      what models without weights were asked and answered
markup      the only way text becomes HTML: escaped
svg         interval plots and line charts
rates       rates as rows with their intervals drawn
jobs        records of a collected sweep
strip       scores as named dots on one axis
html        the page; its sections are in sections_answers, sections_null, sections_transfer, sections_search,
            sections_jobs, sections_made
markdown    the same story, short
"""

from pathlib import Path

from trigger_opt.records import write_text
from trigger_opt.report.html import page
from trigger_opt.report.load import load_run
from trigger_opt.report.markdown import summary
from trigger_opt.report.sections_null import null_command
from trigger_opt.report.words import arithmetic, gradient_sentence, rescored_sentence

__all__ = ["arithmetic", "gradient_sentence", "null_command", "rescored_sentence", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `report.md` into `run_dir` from its record files alone; returns the path of the page.

    Both are replaced atomically and depend on nothing but the records: the same folder gives the same bytes.

    Raises:
        UserError: `verdict.json` is missing (run the stage `verify` first) or a record file cannot be read.
    """
    run = load_run(run_dir)
    write_text(run_dir / "report.md", summary(run))
    html_path = run_dir / "report.html"
    write_text(html_path, page(run))
    return html_path
