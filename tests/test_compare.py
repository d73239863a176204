"""foveal compare: what is read, how runs are joined and aligned, what is refused; the page in a browser."""

import csv
import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveal.runs.cli import main
from foveal.runs.compare import Compare, choose, verdict
from foveal.runs.history import History, label, load
from foveal.runs.run import create_run
from foveal.runs.wandb_file import read_run

TASKS = ("CartPole-v1", "Acrobot-v1")


def make_run(results: Path, agent: str, env: str, seed: int, offset: float, score: float | None = None,
             group: str | None = None, **config: Any) -> Path:  # fmt: skip
    """A finished run of ten evaluations, each `offset` + seed + its number."""
    settings = {"agent": agent, "env_id": env, "seed": seed, "config": {"learning_rate": 0.1} | config}
    settings["options"] = {"seed": seed, "eval_every": 100}
    run = create_run(
        results, group=group or f"{agent}-{env}", name=f"seed{seed}", config=settings, track="off"
    )
    for number in range(10):
        row = {
            "env_step": 100 * number + seed,
            "grad_step": number,
            "eval/return_mean": offset + seed + number,
        }
        run.log(row | {"train/loss": 1 / (1 + number), "time/wall_s": 0.5 * number})
    final = offset + seed + 9 if score is None else score
    summary = {
        "eval/return_mean": final,
        "baseline/random_policy": 1.0,
        "speed/env_steps_per_s": 200.0 + seed,
    }
    run.summarize(summary | {"wall_s": 5.0, "memory/peak_mb": 300.0})
    run.finish("finished")
    return run.path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "results"
    for number, env in enumerate(TASKS):
        for seed in (1, 2, 3):
            make_run(folder, "good", env, seed, 20.0 + number)
            make_run(folder, "bad", env, seed, 10.0, clip="a<b>&\"'</script>")
    (folder / "good-CartPole-v1" / "notes.txt").write_text("not a run")
    return folder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: object) -> str:
    assert main(["compare", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("results").exists()
    return err


def test_one_command_writes_table_figures_csv_and_page(results, capsys):
    pytest.importorskip("plotly")
    assert main(["compare", str(results)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    out = " ".join(out.split())
    assert "good 3 * 31.00 (30.00 to 32.00)" in out
    assert "bad 3 * 21.00 (20.00 to 22.00) 1.00 (1.00 to 1.00) 202 300" in out
    # Three and three seeds have 20 orders, two of which are the clearest.
    assert "On CartPole-v1 good is ahead" in out
    assert "by chance in 10% of cases" in out
    assert "* fewer than 5 seeds" in out
    folder = Path("results/compare")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "compare.html", "curves.png", "curves.svg", "curves.csv", "scores.csv", "profiles.csv",
    }  # fmt: skip
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curves.svg").read_text()
    with (folder / "scores.csv").open() as file:
        scores = {(row["task"], row["label"]): row for row in csv.DictReader(file)}
    assert float(scores["Acrobot-v1", "good"]["mean"]) == 32.0
    assert scores["Acrobot-v1", "good"]["scores"] == "31.0 32.0 33.0"
    assert float(scores["CartPole-v1", "bad"]["best_beats_it"]) == 1.0


def test_curves_hold_recorded_values_where_all_seeds_have_them(results):
    """Seeds were recorded at 100 k + seed: where one was, the others are on the straight line between their
    own values; no step is rounded, and none is before the last first or after the first last one."""
    assert main(["compare", str(results), "--where", "agent=good,env=CartPole-v1", "--out", "out"]) == 0
    with open("out/curves.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [float(row["env_step"]) for row in rows]
    assert steps == [3, *(100 * k + s for k in range(1, 9) for s in (1, 2, 3)), 901]
    third = next(row for row in rows if row["env_step"] == "103.0")
    # Seed 3 has its recorded 24 here, seed 2 is 1 % of the way from 23 to 24, seed 1 is 2 % from 22 to 23.
    assert float(third["eval/return_mean (mean)"]) == pytest.approx((24 + 23.01 + 22.02) / 3)


def test_where_group_and_by_choose_and_join(results):
    chosen = choose(Compare((results,), where=("agent=g*,env=Cart*",)))
    assert {(run.fields["agent"], run.task) for run in chosen.runs} == {("good", "CartPole-v1")}
    chosen = choose(Compare((results,), group="bad-*", by=("seed", "learning_rate")))
    assert sorted(set(chosen.labels)) == [f"seed={seed} learning_rate=0.1" for seed in (1, 2, 3)]
    assert len(chosen.runs) == 6


def test_what_one_agent_was_trained_with_differently_is_another_line(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "dqn", "CartPole-v1", seed, 0.0)
    for seed in (1, 2):
        make_run(tmp_path, "dqn", "CartPole-v1", seed, 5.0, learning_rate=0.5, group="fast")
    runs, _ = load([tmp_path])
    assert sorted(label(runs)) == ["dqn"] * 3 + ["dqn learning_rate=0.5"] * 2


def test_lower_is_better_for_errors_and_likelihoods(tmp_path):
    for agent, errors in (("vae", [0.1, 0.2]), ("pixelcnn", [0.3, 0.4])):
        for seed, error in enumerate(errors):
            run = create_run(tmp_path, group=agent, name=f"s{seed}", track="off",
                             config={"agent": agent, "env_id": "mnist", "seed": seed})  # fmt: skip
            for step in (1, 2):
                run.log({"grad_step": step, "epoch": 1, "validation/nats": 90.0 - step})
            run.summarize({"test/bits_per_dim": error, "test/nats": 100 * error})
            run.finish("finished")
    found = choose(Compare((tmp_path,)))
    assert (found.score, found.lower, found.axis, found.metric) == (
        "test/bits_per_dim", True, "grad_step", "validation/nats",
    )  # fmt: skip
    assert list(found.scores("mnist")) == ["vae", "pixelcnn"]
    assert verdict(found, "mnist").startswith("On mnist vae is ahead: a run of it beats one of pixelcnn with "
                                              "probability 1.00")  # fmt: skip


def test_a_clear_verdict_needs_five_seeds(tmp_path):
    def history(agent: str, score: float) -> History:
        table = {"env_step": np.array([1.0]), "eval/return_mean": np.array([score])}
        fields = {"agent": agent, "env_id": "e"}
        return History(tmp_path, agent, "finished", fields, {"eval/return_mean": score}, table)

    def said(ours: list[float], theirs: list[float]) -> str:
        runs = [history("a", score) for score in ours] + [history("b", score) for score in theirs]
        found = choose(Compare((results_of(runs),)))
        return verdict(found, "e")

    def results_of(runs: list[History]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, run in enumerate(runs):
            made = create_run(folder, group="g", name=str(number), track="off", config=run.fields)
            made.log({"env_step": 1, "eval/return_mean": run.summary["eval/return_mean"]})
            made.summarize(run.summary)
            made.finish("finished")
        return folder

    assert said([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]).startswith("On e a is best")
    assert "not told apart" in said([1, 3, 5, 7, 9], [2, 4, 6, 8, 9.5])
    assert "Not sure" in said([9, 10, 11, 12], [1, 2, 3, 4])


def test_damaged_folders_are_skipped_named_and_counted(results, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    broken, empty, *_ = sorted(copy.glob("bad-*/seed*"))
    (broken / "config.json").write_text("{")
    (empty / "metrics.jsonl").write_text("")
    torn = sorted(copy.glob("good-*/seed*"))[0] / "metrics.jsonl"
    torn.write_bytes(torn.read_bytes()[:-5])  # killed in the middle of a row: all others count
    assert main(["compare", str(copy)]) == 0
    err = capsys.readouterr().err
    assert f"skipped: {broken}: {broken}/config.json is damaged" in err
    assert f"skipped: {empty}: {empty} has no rows yet" in err
    assert "skipped 2 runs, compared 10\n" in err
    runs, _ = load([copy])
    assert sorted(len(run.table["env_step"]) for run in runs) == [9] + [10] * 9


def test_what_cannot_be_compared_says_what_there_is(results, tmp_path, capsys):
    assert "no runs at nowhere" in refused(capsys, "nowhere")
    there = "agent: bad (6 runs), good (6 runs)"
    assert f"no run matches agent=dqn. 12 runs in {results} have {there}" in refused(
        capsys, results, "--where", "agent=dqn"
    )
    assert "no run has a setting 'agnt'; there are agent, " in refused(capsys, results, "--where", "agnt=dqn")
    assert "where takes name=value, got 'dqn'" in refused(capsys, results, "--where", "dqn")
    assert "metric: no run has 'eval/retrun'; nearest: eval/return_mean" in refused(
        capsys, results, "--metric", "eval/retrun"
    )
    assert "axis: no run has 'epoch'" in refused(capsys, results, "--axis", "epoch")
    assert "score: no run has 'fid'" in refused(capsys, results, "--score", "fid")
    with pytest.raises(SystemExit):  # the parser's own
        main(["compare", str(results), "--max-mb", "1"])
    assert "max_mb must be 3 or more" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert "no runs in none" in refused(capsys, "none")


def test_runs_of_different_scores_or_axes_are_named(tmp_path, capsys):
    def made(name: str, row: dict[str, float], summary: dict[str, float]) -> None:
        run = create_run(tmp_path / "all", group="g", name=name, track="off",
                         config={"agent": name, "env_id": "e"})  # fmt: skip
        run.log(row)
        run.summarize(summary)
        run.finish("finished")

    made("dqn", {"env_step": 1, "train/loss": 1.0}, {"eval/return_mean": 1.0})
    made("lenet", {"grad_step": 1, "train/loss": 1.0}, {"test/error": 0.1})
    said = refused(capsys, tmp_path / "all")
    assert "no score in common (eval/return_mean: dqn (1 run); test/error: lenet (1 run))" in said
    made("gan", {"epoch": 1, "train/loss": 1.0}, {"test/error": 0.2})
    said = refused(capsys, tmp_path / "all", "--where", "agent=[lg]*")
    assert "different axes (" in said
    assert "grad_step: 1 run, such as " in said
    assert "epoch: 1 run, such as " in said


# W&B files of other programs


def wandb_file(path: Path, records: list[Any]) -> Path:
    """What W&B writes: LevelDB's log format, records over block boundaries included."""
    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        payload, first = record.SerializeToString(), True
        while first or payload:
            left = 32 * 1024 - len(data) % (32 * 1024)
            if left < 7:
                data += bytes(left)
                continue
            part, payload = payload[: left - 7], payload[left - 7 :]
            kind = (1 if not payload else 2) if first else (4 if not payload else 3)
            first = False
            data += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def foreign_records(seed: int, score: float, rows: int = 300) -> list[Any]:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

    def pairs(container: Any, values: dict[str, Any]) -> None:
        for key, value in values.items():
            item = container.add()
            item.nested_key.append(key) if "/" in key else setattr(item, "key", key)
            item.value_json = json.dumps(value)

    begin = pb.Record()
    begin.run.run_id, begin.run.project, begin.run.display_name = f"abc{seed}", "cleanrl", f"calm-sun-{seed}"
    pairs(begin.run.config.update, {"exp_name": "ppo", "env_id": "Hopper-v5", "seed": seed, "_wandb": {}})
    records = [begin]
    for step in range(rows):
        record = pb.Record()
        pairs(record.history.item, {
            "_step": step, "_runtime": step / 10, "global_step": 2048 * step,
            "charts/episodic_return": score * step / (rows - 1), "note": "x" * 120,
        })  # fmt: skip
        records.append(record)
    stats = pb.Record()
    pairs(stats.stats.item, {"proc.memory.rssMB": 512.5})
    end = pb.Record()
    end.exit.exit_code = 0
    return [*records, stats, end]


def test_reads_other_programs_runs_up_to_a_torn_tail(tmp_path):
    path = wandb_file(tmp_path / "offline-run-1" / "run-abc1.wandb", foreign_records(1, 100.0))
    assert path.stat().st_size > 2 * 32 * 1024
    run = read_run(path)
    assert (run.id, run.name, len(run.rows), run.exited, run.memory_mb) == (
        "abc1", "calm-sun-1", 300, True, 512.5,
    )  # fmt: skip
    assert run.config == {"exp_name": "ppo", "env_id": "Hopper-v5", "seed": 1}
    whole = path.read_bytes()
    counts = []
    for size in (len(whole) - 1, len(whole) - 40, 32 * 1024 + 3, 5_000):
        path.write_bytes(whole[:size])
        torn = read_run(path)
        counts.append(len(torn.rows))
        assert torn.rows == run.rows[: len(torn.rows)]
        assert not torn.exited
    assert counts[0] == 300
    assert 300 > counts[2] > counts[3] > 0
    path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="does not say which run"):
        read_run(path)


def test_compares_other_programs_runs_with_ours(tmp_path, capsys):
    for seed in (1, 2):
        run = create_run(tmp_path / "ours", group="g", name=f"s{seed}", track="off",
                         config={"agent": "dqn", "env_id": "Hopper-v5", "seed": seed})  # fmt: skip
        for step in (1000, 300_000):
            run.log({"env_step": step, "train/return_mean": 5.0})
        run.finish("stopped")
        file = tmp_path / "theirs" / "wandb" / f"offline-run-{seed}" / f"run-abc{seed}.wandb"
        wandb_file(file, foreign_records(seed, 100.0 * seed))
    fragment = tmp_path / "theirs" / "wandb" / "offline-run-9" / "run-abc2.wandb"
    wandb_file(fragment, foreign_records(2, 200.0, rows=400))  # killed, and gone on with in another file
    theirs, damaged = load([tmp_path / "theirs"])
    assert not damaged
    assert [(run.fields["agent"], run.task, len(run.table["_step"])) for run in theirs] == [
        ("ppo", "Hopper-v5", 300), ("ppo", "Hopper-v5", 700),
    ]  # fmt: skip
    names = ["global_step=env_step", "charts/episodic_return=train/return_mean"]
    asked = Compare((tmp_path,), rename=tuple(names), score="train/return_mean")
    found = choose(asked)
    assert (found.axis, found.metric) == ("env_step", "train/return_mean")
    assert {name: scores.tolist() for name, scores in found.scores("Hopper-v5").items()} == {
        "ppo": [100, 200]
    }
    refused(capsys, tmp_path)  # without new names they have no axis and no metric in common


# The page


def browser_page(playwright: Any, path: Path) -> tuple[Any, Any, list[str]]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1200, "height": 800}, color_scheme="dark")
    heard: list[str] = []
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(path.absolute().as_uri())
    page.wait_for_selector("body[data-drawn='1']", timeout=60_000)
    return browser, page, heard


def test_a_benchmarks_file_is_compared_without_run_folders(tmp_path, capsys):
    cells = [
        {"env": "CartPole-v1", "agent": agent, "seed": seed, "steps": 300, "chosen": 10.0 * factor + seed,
         "last": 5.0 * factor, "cpu_s": 1.0, "config": {"learning_rate": 0.1}}
        for agent, factor in (("good", 2), ("bad", 1)) for seed in range(3)
    ]  # fmt: skip
    for cell in cells[:3]:
        cell["curve"] = {"env_step": [100, 200, 300], "eval/return_mean": [1.0, 3.0, cell["chosen"]]}
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"cells": cells, "date": "2026"}))
    assert main(["compare", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"good +3 \* +21\.00 \(20\.00 to 22\.00\)", out)
    assert re.search(r"bad +3 \* +11\.00 \(10\.00 to 12\.00\) +1\.00", out)
    curves = list(csv.DictReader(Path("results/compare/curves.csv").read_text().splitlines()))
    assert [(row["label"], row["env_step"]) for row in curves] == [
        ("good", "100.0"), ("good", "200.0"), ("good", "300.0"), ("bad", "300.0"),
    ]  # fmt: skip
    assert curves[1]["eval/return_mean (mean)"] == "3.0"
    assert main(["compare", str(file), "--score", "last/return_mean"]) == 0
    assert re.search(r"good +3 \* +10\.0+ ", capsys.readouterr().out)
    models = {"cells": [{"task": "digits", "seed": 0, "epochs": 30, "nats": 16.2, "elbo": -17.7}]}
    file.with_name("vae.json").write_text(json.dumps(models))
    assert main(["compare", str(file.with_name("vae.json"))]) == 0
    assert "digits: test/nats, lower is better" in capsys.readouterr().out
    for wrong in ("[]", "{", json.dumps({"cells": []}), json.dumps({"steps_per_cpu_second": {"foveal": 1}})):
        file.write_text(wrong)
        assert main(["compare", str(file)]) == 2
        assert str(file) in capsys.readouterr().err


def test_a_sweeps_trials_are_called_by_their_numbers(tmp_path, capsys):
    for group in ("a", "b"):
        for number in range(2):
            settings = {"agent": "dqn", "env_id": "x", "seed": 1, "config": {"rate": 0.123456789 + number}}
            name = f"trial{number:03d}"
            run = create_run(tmp_path / "r", group=group, name=name, config=settings, track="off")
            run.log({"env_step": 1, "eval/return_mean": 5.0 + number})
            run.summarize({"eval/return_mean": 5.0 + number})
            run.finish("finished")
    assert main(["compare", str(tmp_path / "r" / "a")]) == 0
    assert re.search(r"^  trial 1 .*\n  trial 0 ", capsys.readouterr().out, re.M)
    assert main(["compare", str(tmp_path / "r")]) == 0
    assert re.search(r"^  b trial 1 ", capsys.readouterr().out, re.M)


def test_another_programs_sweep_json_is_passed_over(tmp_path, capsys):
    pytest.importorskip("plotly")
    cell = {"env": "CartPole-v1", "agent": "ppo", "chosen": 7.0, "last": 5.0, "steps": 20}
    cells = [
        {**cell, "seed": seed, "curve": {"env_step": [10, 20], "eval/return_mean": [seed, 7]}}
        for seed in (0, 1)
    ]
    (tmp_path / "suite.json").write_text(json.dumps({"cells": cells}))
    (tmp_path / "sweep.json").write_text('{"trials": [], "importance": {"rate": 1.0}}')
    assert main(["compare", str(tmp_path / "suite.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "compare.html").exists()
    assert "ppo" in capsys.readouterr().out


def test_the_page_in_a_browser(results):
    pytest.importorskip("plotly")
    sync = pytest.importorskip("playwright.sync_api")
    assert main(["compare", str(results)]) == 0
    path = Path("results/compare/compare.html")

    def means(task: str = "CartPole-v1") -> dict[str, list[Any]]:
        """The thick lines of a task's plot: label -> [x, y]."""
        return page.evaluate(
            """task => Object.fromEntries([...document.querySelectorAll('#curves .plot')]
            .find(p => p.dataset.name === task).data.filter(t => t.meta === 'mean')
            .map(t => [t.name, [[...t.x], [...t.y]]]))""",
            task,
        )

    def drawn_again(act: Any) -> None:
        number = int(page.evaluate("document.body.dataset.drawn"))
        act()
        page.wait_for_selector(f"body[data-drawn='{number + 1}']", timeout=30_000)

    with sync.sync_playwright() as playwright:
        browser, page, heard = browser_page(playwright, path)
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        # The means are those of the CSV, to the seven digits of float32.
        with open("results/compare/curves.csv") as file:
            rows = [row for row in csv.DictReader(file) if (row["task"], row["label"]) == (TASKS[0], "good")]
        x, y = means()["good"]
        assert x == [float(row["env_step"]) for row in rows]
        assert y == pytest.approx([float(row["eval/return_mean (mean)"]) for row in rows], rel=1e-6)
        assert "Ahead, but not sure." in page.inner_text("#verdicts")
        # Intervals and probabilities are those of Python.
        found = choose(Compare((results,)))
        ours = {task: list(found.scores(task).values()) for task in TASKS}
        p, low, high = page.evaluate(
            "tasks => improvement(tasks.map(t => t[0]), tasks.map(t => t[1]))",
            [[scores.tolist() for scores in [ours[task][0] - 9.5, ours[task][1]]] for task in TASKS],
        )
        expected = found.improvement([ours[t][0] - 9.5 for t in TASKS], [ours[t][1] for t in TASKS])
        assert (p, low, high) == pytest.approx(expected, abs=0.06)
        assert 0.5 < p < 0.9

        drawn_again(lambda: page.select_option("#axis", "grad_step"))
        assert means()["good"][0] == list(range(10))
        drawn_again(lambda: page.fill("#filter", "seed=1 agent=g*"))
        assert means() == {"good": [list(range(10)), [21 + n for n in range(10)]]}
        assert page.locator("#runs tbody tr").count() == 2
        drawn_again(lambda: page.fill("#filter", ""))
        assert page.locator("#runs tbody tr").count() == 12
        # A run without its tick counts nowhere: the mean of seeds 1 to 3 becomes that of two.
        assert means()["good"][1][0] == pytest.approx(22)
        row = page.locator("#runs tbody tr").filter(has_text="CartPole-v1").filter(has_text="32").first
        drawn_again(lambda: row.locator("input").click())
        assert means()["good"][1][0] == pytest.approx(21.5)
        drawn_again(lambda: page.click("[data-label=bad]"))
        assert list(means()) == ["good"]
        page.click("[data-sort=seed]")
        seeds = [int(text) for text in page.locator("#runs tbody tr td:nth-child(5)").all_inner_texts()]
        assert seeds == sorted(seeds)
        drawn_again(lambda: page.fill("#smoothing", "0.9"))
        assert means()["good"][1][-1] < 30
        drawn_again(lambda: page.click("#theme"))
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        assert heard == [path.absolute().as_uri()]
        browser.close()


def test_the_page_keeps_to_its_size_and_says_what_it_leaves_out(tmp_path, capsys):
    pytest.importorskip("plotly")
    rng = np.random.default_rng(0)
    run = create_run(tmp_path / "big", group="g", name="s", track="off", config={"agent": "a", "env_id": "e"})
    for step in range(4_000):
        noise = {f"train/m{number:02}": float(value) for number, value in enumerate(rng.normal(size=100))}
        run.log({"env_step": step, "eval/return_mean": float(step)} | noise)
    run.summarize({"eval/return_mean": 1.0})
    run.finish("finished")
    assert main(["compare", str(tmp_path / "big"), "--max-mb", "3"]) == 0
    err = capsys.readouterr().err
    size = Path("results/compare/compare.html").stat().st_size
    assert 2_500_000 < size <= 3_000_000
    assert "not in the page: train/m99: too large" in err
    assert "eval/return_mean" not in err
