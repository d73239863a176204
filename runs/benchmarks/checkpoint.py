"""What checkpoints cost a DQN on Atari with a replay of 100,000 transitions.

    python -m foveal.runs.benchmarks.checkpoint     # about 6 CPU minutes

Fills the replay of ALE/Pong-v5, then trains on, with a checkpoint every 10,000 environment steps (the default
of `foveal train`), and compares the wall time of both.
"""

import sys
import tempfile
import time
from pathlib import Path

from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results

EVERY = 10_000


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoints", type=count, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    arguments = parser.parse_args()

    import torch

    from ...agents import DQN, save_checkpoint

    torch.set_num_threads(1)
    # Epsilon as late in a training, so that most steps pay for the network.
    dqn = DQN("ALE/Pong-v5", DQN.recipe("ALE/Pong-v5", exploration_fraction=1e-6), seed=1, device="cpu")
    filled = dqn.config.buffer_size
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for row in dqn.training(filled + arguments.checkpoints * EVERY, log_every=EVERY):
            trained = time.perf_counter() - start
            if row["env_step"] >= filled:
                start = time.perf_counter()
                path = save_checkpoint(dqn, Path(folder))
                files = [f.stat() for f in path.iterdir()]
                rows.append(
                    {
                        "env_step": row["env_step"],
                        "training_s": trained,
                        "checkpoint_s": time.perf_counter() - start,
                        "megabytes": sum(f.st_size for f in files) / 1e6,
                        "megabytes_written": sum(f.st_size for f in files if f.st_nlink == 1) / 1e6,
                    }
                )
                print(rows[-1], flush=True)
            start = time.perf_counter()
    later = rows[1:]  # the first writes the whole replay, once
    share = sum(r["checkpoint_s"] for r in later) / sum(r["training_s"] for r in later)
    write_results(arguments.out, {**machine_info(), "checkpoints": rows, "share_of_training_time": share})
    print(f"a checkpoint every {EVERY:,} steps costs {share:.1%} of the training time")


if __name__ == "__main__":
    sys.exit(guarded(main))
