"""The quickstart's comparison over several seeds of order and selection.

    uv run python benchmarks/quickstart_seeds.py

Starting model and reference are made once; each seed changes the order of the data and the random
selection. Files go to runs/quickstart_seeds.
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
        f"{'seed':6}{'base':>8}{'uniform':>9}{'random_topk':>13}{'rho1':>8}  noise in data, weight"
    )
    for seed in args.seeds:
        folder = Path("runs/quickstart_seeds") / str(seed)
        command = [
            *(Path(sys.executable).with_name("tune"), "run", "--nproc_per_node", "2"),
            "recipes/rho1_wmtp_distributed.py",
            *("--config", "configs/quickstart/rho1.yaml", f"seed={seed}", f"output_dir={folder}"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        summary = json.loads((folder / "summary.json").read_text())
        mean = {name: sum(loss) / len(loss) for name, loss in summary["heldout_loss"].items()}
        share = summary["corrupted_share"]
        print(
            f"{seed:<6}{mean['base']:8.3f}{mean['uniform']:9.3f}{mean['random_topk']:13.3f}"
            f"{mean['rho1']:8.3f}  {share['data']:.3f}, {share['selected']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
