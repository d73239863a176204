"""Show how a training goes: a live bar in a terminal, plain lines elsewhere.

    with progress(total_steps, label="dqn CartPole-v1") as update:
        for row in agent.training(total_steps):
            update(row)

Everything goes to stderr, so that a command's result on stdout can be piped.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["progress"]

COLUMNS = {  # row key: how it is shown; a key that never came is left out
    "train/loss": "loss {:.3g}",
    "train/accuracy": "accuracy {:.1%}",
    "validation/accuracy": "validation {:.2%}",
    "train/return_mean": "return {:,.1f}",
    "eval/return_mean": "eval {:,.1f}",
    "train/epsilon": "epsilon {:.2f}",
    "train/q_loss": "loss {:.3g}",
}
REDRAW_S = 0.25  # a redraw costs about 0.5 ms, so 0.2 % of the time
LINE_S = 10.0  # without a terminal, a line every 10 s
LINE_SHARE = 0.05  # or every 5 % of the steps, whichever comes first
SPEED_WINDOW_S = (
    30.0  # long enough to be calm, short enough to notice when learning starts and steps get slower
)


@contextmanager
def progress(
    total_steps: int, start: int = 0, *, enabled: bool = True, label: str = "", axis: str = "env_step"
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that takes a metrics row and shows it.

    Args:
        total_steps: steps at the end of the training.
        start: steps already done (a resumed run); they do not count into the speed.
        enabled: False gives a function that does nothing.
        label: what is being trained, shown in front.
        axis: what steps are: env_step or grad_step.

    The function may be called as often as wished: in between redraws a row costs a few microseconds. Rows
    need no particular keys; the last value of each is shown. No thread is started, because environments and
    seeds may fork. Leaving the block, by Ctrl-C too, shows the last state and gives the terminal back as it
    was.
    """
    if not enabled:
        yield lambda row: None
        return
    meter = Meter(total_steps, start, label, axis)
    # Decided without rich, which takes 50 ms to import.
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        display = live_display(meter)
    else:
        display = plain_display(meter)
    with display as show:
        yield lambda row: show(meter.take(row))


class Meter:
    """Steps done, speed, and the last value of every column."""

    def __init__(self, total_steps: int, start: int, label: str, axis: str = "env_step") -> None:
        self.total, self.step, self.label, self.axis = total_steps, start, label, axis
        self.began = time.monotonic()
        self.values: dict[str, str] = {}
        self.samples = deque([(self.began, start)])  # (s, steps), at most one per redraw

    def take(self, row: Mapping[str, Any]) -> float:
        """Remember a row; the time of it, in seconds."""
        now = time.monotonic()
        self.step = row.get(self.axis, self.step)
        for key, form in COLUMNS.items():
            value = row.get(key)
            if value is not None:
                self.values[key] = form.format(value)
        if now - self.samples[-1][0] >= REDRAW_S:
            self.samples.append((now, self.step))
            while now - self.samples[1][0] > SPEED_WINDOW_S:
                self.samples.popleft()
        return now

    @property
    def speed(self) -> float:
        """Steps a second of late; 0 before the first row."""
        seconds = time.monotonic() - self.samples[0][0]
        return (self.step - self.samples[0][1]) / seconds if seconds > 0 else 0.0

    @property
    def share(self) -> float:
        return min(1.0, self.step / self.total) if self.total > 0 else 1.0

    @property
    def steps(self) -> str:
        return f"{self.step:,}/{self.total:,} steps"

    @property
    def columns(self) -> list[str]:
        return [self.values[key] for key in COLUMNS if key in self.values]

    @property
    def pace(self) -> str:
        speed = self.speed
        if self.step >= self.total:
            return f"{speed:,.0f} steps/s, took {clock(time.monotonic() - self.began)}"
        return (
            f"{speed:,.0f} steps/s, {clock((self.total - self.step) / speed) if speed > 0 else '-:--'} left"
        )


def clock(seconds: float) -> str:
    """
    >>> clock(75), clock(3 * 3600 + 62)
    ('1:15', '3:01:02')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def plain_display(meter: Meter) -> Iterator[Callable[[float], None]]:
    shown_at, shown_step = meter.began, meter.step

    def line(now: float) -> None:
        nonlocal shown_at, shown_step
        shown_at, shown_step = now, meter.step
        parts = [meter.label, f"{meter.share:4.0%}", meter.steps, meter.pace, *meter.columns]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def show(now: float) -> None:
        if now - shown_at >= LINE_S or meter.step - shown_step >= LINE_SHARE * meter.total:
            line(now)

    try:
        yield show
    finally:
        if meter.step > shown_step:
            line(time.monotonic())


@contextmanager
def live_display(meter: Meter) -> Iterator[Callable[[float], None]]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def render() -> RenderableType:
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)  # the bar takes the width that is left
        line.add_column(no_wrap=True, justify="right")
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            Text(meter.label, style="bold"),
            ProgressBar(completed=100 * meter.share, complete_style="cyan", finished_style="green"),
            Text(meter.steps),
            Text(meter.pace, style="cyan"),
        )
        return Group(line, Text("   ".join(meter.columns)))

    shown_at = 0.0
    with Live(console=Console(stderr=True), get_renderable=render, auto_refresh=False) as live:

        def show(now: float) -> None:
            nonlocal shown_at
            if now - shown_at >= REDRAW_S:
                shown_at = now
                live.refresh()

        yield show
