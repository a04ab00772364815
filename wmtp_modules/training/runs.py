"""The runs that one config asks for: required ones, controls, and the table of their figures."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def required_runs(cfg: DictConfig) -> Iterator[DictConfig]:
    """Configs that ``requires`` names, on this run's device; done ones are not run again."""
    for path in cfg.get("requires") or []:
        inherited = {key: cfg[key] for key in ("device", "assets_dir") if key in cfg}
        required = OmegaConf.load(path)
        # Resuming makes a finished one a no-op and goes on with one that was killed.
        yield OmegaConf.merge(required, inherited, {"resume_from_checkpoint": True})


def control_runs(cfg: DictConfig) -> Iterator[DictConfig]:
    """This config under each weighting that ``controls`` names: same data, same steps."""
    for name in cfg.get("controls") or []:
        output_dir = str(Path(cfg.output_dir) / "controls" / name)
        yield OmegaConf.merge(cfg, {"weighting": {"name": name}, "output_dir": output_dir})


def is_done(cfg: DictConfig) -> bool:
    """Whether this very config has run to its end in its ``output_dir``."""
    files = [Path(cfg.output_dir) / name for name in ("config.yaml", "summary.json")]
    if not all(file.exists() for file in files):
        return False
    saved, wanted = OmegaConf.load(files[0]), OmegaConf.to_container(cfg, resolve=True)
    return OmegaConf.to_container(saved) | {"resume_from_checkpoint": None} == wanted | {
        "resume_from_checkpoint": None
    }


def print_losses(losses: dict[str, list[float]], steps: int) -> None:
    """Held-out loss per head of every run, as a table.

    Args:
        losses: K losses of each run by name; ``base`` is before training.
        steps: optimizer steps of every run.
    """
    K = len(losses["base"])
    print(f"\nHeld-out loss per head after {steps} steps (base: before)")
    print(" " * 14 + "".join(f"head {k}  " for k in range(K)) + "mean")
    for name, loss_K in losses.items():
        cells = "".join(f"{loss:6.3f}  " for loss in loss_K)
        print(f"  {name:12}{cells}{sum(loss_K) / K:6.3f}")


def print_places(output_dir: Path, summary: dict) -> None:
    """Where a run's checkpoints, picture and figures are."""
    print(f"Checkpoints  {output_dir / 'best'} and {output_dir / 'last'}")
    print(f"Curves       {output_dir / 'curves.png'}")
    print(f"Figures      {output_dir / 'summary.json'} and {output_dir / 'metrics.jsonl'}")
    if "tracking" in summary:
        print(f"MLflow       {summary['tracking']}")
