"""Whether another run, of which only its config's path is known here, has ended."""

from pathlib import Path

from omegaconf import OmegaConf

from wmtp_modules.run.plan import is_done, required_runs


def finished_run(config_file: str, **inherited: str) -> Path | None:
    """The folder of a run that has ended, None while it has not.

    Args:
        config_file: config of that run.
        inherited: what the run that requires it hands on, such as ``assets_dir``.

    Raises:
        ConfigError: if the file cannot be read.
    """
    (cfg,) = required_runs(OmegaConf.create({"requires": [config_file], **inherited}))
    output_dir = Path(cfg.output_dir)
    return output_dir if is_done(cfg) else None
