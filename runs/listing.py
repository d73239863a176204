"""The runs of a results folder, as a table."""

from pathlib import Path

from .run import list_runs


def print_runs(results: Path) -> None:
    """Print one line a run: folder, state, steps, score and time; damaged ones last, with the reason."""
    runs = list_runs(results)
    whole = [run for run in runs if run["state"] != "damaged"]
    header = ("run", "state", "env steps", "score", "seconds")
    rows = [
        (
            str(run["path"]),
            run["state"] or "?",
            _number(run["env_step"], ",.0f"),
            _number(run["score"], ",.1f"),
            _number(run["wall_s"], ",.0f"),
        )
        for run in whole
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for name, state, *numbers in [header, *rows]:
        cells = [name.ljust(widths[0]), state.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:])]
        print("  ".join(cells).rstrip())
    for run in runs:
        if run["state"] == "damaged":
            print(f"damaged: {run['path']}: {run['error']}")
    if not runs:
        print(f"(no runs in {results})")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
