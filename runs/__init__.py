"""What a run is: command line, tracking, evaluation, plots, films, benchmarks."""

from .evaluation import evaluate
from .run import Run, create_run, list_runs, open_run, resume_run

__all__ = ["Run", "create_run", "evaluate", "list_runs", "open_run", "resume_run"]
