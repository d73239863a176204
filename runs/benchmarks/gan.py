"""GANs on MNIST and Fashion-MNIST: three losses, and a conditional one, measured on a classifier's features.

    python -m foveal.runs.benchmarks.gan            # finished cells are skipped, a stopped one goes on
    python -m foveal.runs.benchmarks.gan --report   # the table of what is there, as Markdown

A cell is one dataset, variant and seed: a run of `foveal train gan` with its recipe, one thread. FID,
precision, recall and the rest are of 10,000 samples and the 10,000 test images, on the features of the
dataset's extractor (LeNet-5, trained once, see `--extractor auto`); of the weights with the best FID on the
validation images, and of the last ones. `classes` is the smallest and the largest share of samples that the
extractor takes for one class, `right` the share of a conditional model's samples that it takes for the class
asked for; both are of the worst seed.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...generative import GAN
from ..cli import guarded
from ..fit import FitOptions, fit, resume_fit
from ..run import open_run
from .common import RESULTS, append_cell, argument_parser, count
from .suite import read

VARIANTS: dict[str, dict[str, Any]] = {
    "DCGAN": {"loss": "non-saturating"},
    "WGAN-GP": {"loss": "wgan-gp"},
    "hinge + SN": {"loss": "hinge"},
    "hinge + SN, projection": {"loss": "hinge", "conditional": "projection"},
}
MEASURED = ("fid", "kid", "precision", "recall", "density", "coverage", "class_share_min", "class_share_max",
            "class_accuracy", "nearest_train", "nearest_train_of_test")  # fmt: skip


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--datasets", nargs="+", default=["mnist", "fashion-mnist"], help="which (both)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="which (all)")
    parser.add_argument("--seeds", type=count, default=3, help="how many (3)")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the training images (3)")
    parser.add_argument("--data-dir", type=Path, help="where the data sets are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "gan.json")
    parser.add_argument("--report", action="store_true", help="print the table of finished cells")
    given = parser.parse_args()
    if given.report:
        print(report(read(given.out)))
        return 0
    for seed in range(given.seeds):
        for dataset in given.datasets:
            for variant in given.variants:
                cell = {"dataset": dataset, "variant": variant, "seed": seed, "epochs": given.epochs}
                if not any(cell.items() <= row.items() for row in read(given.out)):
                    cell |= train_cell(cell, given.data_dir, given.results)
                    append_cell(given.out, cell, ("dataset", "variant", "seed", "epochs"), place)
    return 0


def place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Where a cell stands in the table."""
    return cell["dataset"] != "mnist", cell["dataset"], list(VARIANTS).index(cell["variant"]), cell["seed"]


def train_cell(cell: dict[str, Any], data_dir: Path | None, results: Path) -> dict[str, Any]:
    """Train, or go on with, the run of a cell; what it measured."""
    options = FitOptions(
        dataset=cell["dataset"], data_dir=data_dir, epochs=cell["epochs"], seed=cell["seed"], threads=1,
        results=results, group="gan-benchmark", track="off", progress=False, pictures_every=1e9,
        name=f"{cell['dataset']}-{cell['variant']}-{cell['epochs']:g}".replace(" ", ""),
    )  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    old = [open_run(path) for path in sorted((results / "gan-benchmark").glob(f"{options.name}-*"))]
    old = [run for run in old if run.config["seed"] == cell["seed"]]
    going = next((run for run in old if run.summary.get("state") != "finished"), None)
    if going is not None:
        run = resume_fit(going.path, None, None, progress=False)
    else:
        run = fit("gan", options, GAN.recipe(**VARIANTS[cell["variant"]], dataset=cell["dataset"]))
    if run.summary["state"] != "finished":
        raise SystemExit(130)
    after = resource.getrusage(resource.RUSAGE_SELF)
    best, last = (
        {name: run.summary[f"{part}/{name}"] for name in MEASURED if f"{part}/{name}" in run.summary}
        for part in ("test", "last")
    )
    return {
        "best": best | {"grad_step": run.summary["best/grad_step"]},
        "last": last | {"grad_step": run.summary["last/grad_step"]},
        "fid_of_training_images": run.summary["baseline/fid_of_training_images"],
        "extractor": run.summary["test/fid_extractor"],
        "images": run.summary["test/fid_images"],
        "split": run.summary["test/fid_split"],
        "resize": run.summary["test/fid_resize"],
        "resumed": going is not None,
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "wall_s": round(time.perf_counter() - began),
        "config": run.config["config"],
    }


COLUMNS = ("data", "model", "epochs", "seeds", "weights", "FID", "precision", "recall", "density", "coverage",
           "classes", "right")  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, two lines a kind of cell, of its best and last weights: means over seeds, of FID
    with the range; shares of classes, and of what is right, are the worst seed's."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    kinds = dict.fromkeys((row["dataset"], row["variant"], row["epochs"]) for row in rows)
    for kind in kinds:
        mine = [row for row in rows if (row["dataset"], row["variant"], row["epochs"]) == kind]
        for weights in ("best", "last"):
            values = {name: [r[weights][name] for r in mine if name in r[weights]] for name in MEASURED}
            figures = [
                f"{np.mean(values[name]):.2f}"
                for name in ("fid", "precision", "recall", "density", "coverage")
            ]
            if len(mine) > 1:
                figures[0] += f" ({min(values['fid']):.2f} to {max(values['fid']):.2f})"
            shares = f"{min(values['class_share_min']):.1%} to {max(values['class_share_max']):.1%}"
            right = f"{min(values['class_accuracy']):.1%}" if values["class_accuracy"] else ""
            lines.append((*kind[:2], f"{kind[2]:g}", f"{len(mine)}", weights, *figures, shares, right))
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        floor = np.mean([row["fid_of_training_images"] for row in rows if row["dataset"] == dataset])
        lines.append((dataset, "training images", "", "", "", f"{floor:.2f}", *[""] * 6))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(guarded(main))
