"""The critic's quickstart over several seeds: accuracy within pairs, and held-out losses.

    uv run python benchmarks/critic_seeds.py

Functions, mutations and the starting model are made once. Each seed changes the value head's start,
the pairs, the order of the data and the shuffling; the first columns tell the critic's held-out
accuracy within pairs, the others the held-out loss after equal steps, mean of heads. Files go to
runs/critic_seeds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import hardware


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(hardware())
    print(
        "seed   critic  length  margin   auc    delta near, chance"
        "    base  uniform  shuffled  critic"
    )
    ok = True
    for seed in args.seeds:
        folder = Path("runs/critic_seeds") / str(seed)
        command = [
            *(Path(sys.executable).with_name("tune"), "run", "--nproc_per_node", "2"),
            "recipes/critic_wmtp_distributed.py",
            *("--config", "configs/quickstart/critic.yaml", f"seed={seed}", f"output_dir={folder}"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        summary = json.loads((folder / "summary.json").read_text())
        critic, near = summary["critic"], summary["delta_near_mutation"]
        margin = critic["pair_accuracy"] - max(critic["length_only"], 0.5)
        ok &= margin >= 0.1
        mean = {name: sum(loss) / len(loss) for name, loss in summary["heldout_loss"].items()}
        print(
            f"{seed:<6}{critic['pair_accuracy']:7.3f}{critic['length_only']:8.3f}{margin:8.3f}"
            f"{critic['auc']:7.3f}{near['share']:11.3f}, {near['chance']:.3f}{mean['base']:11.3f}"
            f"{mean['uniform']:8.3f}{mean['shuffled']:9.3f}{mean['critic']:9.3f}",
            flush=True,
        )
    print("PASS" if ok else "FAIL", "accuracy at least 0.1 above length alone and a constant")


if __name__ == "__main__":
    main()
