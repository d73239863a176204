"""The progress display: what it shows, when, and that it gives the terminal back."""

import io
import subprocess
import sys
import threading

import pytest

from foveal.agents import progress as module
from foveal.agents.progress import clock, progress


def interrupted():
    with pytest.raises(KeyboardInterrupt), progress(1_000) as update:  # noqa: PT012
        update({"env_step": 7})
        raise KeyboardInterrupt


class Screen(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Stands in for the time module; moves only when told."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def ticks(monkeypatch):
    ticks = Clock()
    monkeypatch.setattr(module, "time", ticks)
    return ticks


def terminal(monkeypatch):
    """Stderr as a terminal. Called in the test's body: pytest sets its own stderr after the fixtures."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_plain_lines_come_every_5_percent(ticks, capsys):
    with progress(1_000, label="dqn CartPole-v1") as update:
        for step in range(10, 1_001, 10):
            ticks.now += 0.1  # 100 steps/s
            update({"env_step": step, "train/return_mean": 21.5, "train/q_loss": 0.012345, "train/other": 7})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 20
    assert lines[0].split("  ") == [
        "dqn CartPole-v1", "", "5%", "50/1,000 steps", "100 steps/s, 0:10 left", "return 21.5", "loss 0.0123"
    ]  # fmt: skip
    assert "100%  1,000/1,000 steps  100 steps/s, took 0:10" in lines[-1]


def test_plain_lines_come_every_10_seconds_in_a_long_run(ticks, capsys):
    with progress(10_000_000) as update:
        for step in range(1, 101):
            ticks.now += 1
            update({"env_step": step})
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_a_resumed_run_counts_only_its_own_steps_as_speed(ticks, capsys):
    with progress(1_000, start=900) as update:
        ticks.now += 2
        update({"env_step": 950})
    assert " 95%  950/1,000 steps  25 steps/s, 0:02 left" in capsys.readouterr().err


def test_speed_follows_the_last_half_minute(ticks, capsys):
    with progress(1_000_000) as update:
        step = 0
        for speed in (5_000, 100):
            for _ in range(60):
                ticks.now += 1
                step += speed
                update({"env_step": step})
    assert "  100 steps/s" in capsys.readouterr().err.splitlines()[-1]


def test_values_keep_their_place_and_their_last_value(ticks, capsys):
    with progress(100) as update:
        ticks.now += 1
        update({"env_step": 20, "train/q_loss": 0.5, "train/epsilon": 1.0})
        update({"env_step": 40, "train/return_mean": 1234.5, "train/epsilon": None})
        update({"env_step": 40, "eval/return_mean": 9})
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.endswith("left  epsilon 1.00  loss 0.5")
    assert second.endswith("return 1,234.5  epsilon 1.00  loss 0.5")


def test_interrupted_plain_run_says_where_it_stopped(ticks, capsys):
    interrupted()
    assert "7/1,000 steps" in capsys.readouterr().err


def test_disabled_shows_nothing(capsys):
    with progress(10, enabled=False) as update:
        update({"env_step": 10})
    assert capsys.readouterr() == ("", "")


def test_terminal_shows_a_bar_and_everything_else(monkeypatch, ticks):
    screen = terminal(monkeypatch)
    with progress(1_000, label="dqn Pong") as update:
        for step in range(100, 1_001, 100):
            ticks.now += 1
            update({"env_step": step, "train/return_mean": -20.5, "train/epsilon": 0.1, "train/q_loss": 0.25})
    text = screen.getvalue()
    for part in (
        "dqn Pong",
        "━",
        "500/1,000 steps",
        "1,000/1,000 steps",
        "return -20.5",
        "epsilon 0.10",
        "loss 0.25",
    ):
        assert part in text
    assert "100 steps/s, 0:05 left" in text
    assert "took 0:10" in text


def test_terminal_redraws_at_most_four_times_a_second(monkeypatch, ticks):
    terminal(monkeypatch)
    from rich.live import Live

    redraws = []
    monkeypatch.setattr(Live, "refresh", lambda self: redraws.append(ticks.now))
    threads = threading.active_count()
    with progress(10_000) as update:
        assert threading.active_count() == threads
        before = len(redraws)
        for step in range(10_000):  # one simulated second
            ticks.now += 1e-4
            update({"env_step": step})
        assert 3 <= len(redraws) - before <= 5


def test_interrupt_gives_the_cursor_back(monkeypatch):
    screen = terminal(monkeypatch)

    interrupted()
    text = screen.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "7/1,000 steps" in text
    assert sys.stderr is screen  # rich redirects it while the bar is up


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    screen = terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with progress(10) as update:
        for step in range(1, 11):
            update({"env_step": step})
    assert "\x1b" not in screen.getvalue()
    assert [line.split()[1] for line in screen.getvalue().splitlines()] == [f"{i}/10" for i in range(1, 11)]


def test_rich_is_not_imported_without_a_terminal():
    code = (
        "import sys; from foveal.agents.progress import progress\n"
        "with progress(10) as update: update({'env_step': 10})\n"
        "assert not any(name.split('.')[0] == 'rich' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (36_061, "10:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
