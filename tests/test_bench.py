"""foveal bench: suites of benchmarks that exist, and tables that are what was measured."""

import importlib
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from checkout import ROOT

from foveal.runs.bench import MEASURED, SUITES, TABLES, markdown, on_policy_speed_table
from foveal.runs.cli import main


def test_the_readmes_tables_are_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (.+) -->", readme)) == set(TABLES)
    assert main(["bench", "tables", "--file", str(ROOT / "README.md"), "--check"]) == 0


def test_a_table_that_was_typed_is_told_and_mended(tmp_path, capsys):
    file = tmp_path / "page.md"
    text = "# Title\n\n<!-- table: speed -->\n{}\n<!-- end of table -->\n\nAfter.\n"
    file.write_text(text.format("| foveal | a million |"))
    assert main(["bench", "tables", "--file", str(file), "--check"]) == 1
    assert "the table speed is not what was measured" in capsys.readouterr().err
    assert "a million" in file.read_text()
    assert main(["bench", "tables", "--file", str(file)]) == 0
    assert file.read_text() == text.format(TABLES["speed"](MEASURED))
    assert main(["bench", "tables", "--file", str(file), "--check"]) == 0
    capsys.readouterr()
    for wrong, said in (("<!-- table: sped -->", "unknown table 'sped'"), ("# none", "takes tables between")):
        file.write_text(wrong + "\n")
        assert main(["bench", "tables", "--file", str(file)]) == 2
        assert said in capsys.readouterr().err


def test_a_table_shows_the_numbers_of_its_file(tmp_path):
    task = {
        "steps_per_cpu_second": {"foveal": 4543.03, "sb3": 2022.1},
        "ratio_to_sb3": [2.08, 2.48],
        "ratio": 2.28,
    }
    content = {"tasks": {"A2C": task, "PPO": {**task, "ratio_to_sb3": [1.5], "ratio": 1.5}}}
    (tmp_path / "on_policy_speed.json").write_text(json.dumps(content))
    assert on_policy_speed_table(tmp_path).splitlines()[2:] == [
        "| A2C | 4,543 | 2,022 | 2.3 (2.1 to 2.5) |",
        "| PPO | 4,543 | 2,022 | 1.5 |",
    ]
    assert markdown(["", "a"], [["x", "1"]]) == "| | a |\n|---|--:|\n| x | 1 |"


def test_suites_run_their_parts_in_order_and_stop_at_a_failure(monkeypatch, capsys):
    for parts in SUITES.values():
        for part in parts:
            assert callable(importlib.import_module(f"foveal.runs.benchmarks.{part.module}").main)
    ran: list[list[str]] = []

    def run(command: list[str]) -> Any:
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, int(len(ran) == 2))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "minatar", "--seeds", "3", "--jobs", "2"]) == 1
    assert ran[0][0] == "foveal.runs.benchmarks.suite"
    assert ran[0][-4:] == ["--jobs", "2", "--seeds", "3"]
    assert [command[0] for command in ran] == [
        "foveal.runs.benchmarks.suite", "foveal.runs.benchmarks.transfer",
    ]  # fmt: skip
    assert "transfer ended with exit code 1" in capsys.readouterr().err
    ran.clear()
    assert main(["bench", "speed", "--plan"]) == 0
    assert ran == []
    assert main(["bench", "list"]) == 0
    assert "on_policy_speed" in capsys.readouterr().out


def test_a_plan_names_what_is_left():
    done = subprocess.run(
        [sys.executable, "-m", "foveal.runs", "bench", "box2d", "--plan", "--seeds", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"LunarLander-v3 +\d of +2 cells left", done.stdout)


@pytest.mark.parametrize("arguments", [["classics"], ["classic", "--jobs", "0"]])
def test_what_is_no_suite_is_refused(arguments):
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert error.value.code == 2
