"""The command ``wmtp``: a project of one's own, a check before it runs, and our other programs.

Whatever needs torch is imported by the command that needs it: ``wmtp --help`` shall be quick.
"""

import importlib
import sys
from typing import NoReturn

import click

# Programs that are modules with a main(argv) as well: module, and what --help shows of each.
PROGRAMS = {
    "convert": (
        "wmtp_modules.convert",
        "Convert a checkpoint between Meta's and Hugging Face's format.",
        (
            "wmtp convert checkpoints/Sheared-LLaMA-1.3B checkpoints/start --to mtp",
            "wmtp convert runs/rho1_7b/best runs/rho1_7b/hf --to hf",
        ),
    ),
    "estimate-memory": (
        "wmtp_modules.estimate_memory",
        "Predict the peak memory of a training config, without a GPU.",
        (
            "wmtp estimate-memory wmtp/rho1_7b --ranks 8",
            "wmtp estimate-memory my.yaml --ranks 1 batch_size=1",
        ),
    ),
    "doctor": (
        "wmtp_modules.doctor",
        "One page about a config before it runs: data, model, memory, disk, servers, time.",
        (
            "wmtp doctor my.yaml",
            "wmtp doctor wmtp/rho1_7b --ranks 8 --tokens-per-s 20000 environment=cluster",
        ),
    ),
    "compare": (
        "wmtp_modules.reports.compare",
        "Put several runs and their controls into one page and one table.",
        ("wmtp compare runs/a_0 runs/a_1 runs/b --output compare.html",),
    ),
    "page": (
        "wmtp_modules.reports.run_page",
        "Draw a run's page, run.html, again.",
        ("wmtp page runs/rho1_7b",),
    ),
    "sync": (
        "wmtp_modules.sync",
        "Send what a run that has ended could not, to MLflow and its store.",
        ("wmtp sync runs/rho1_7b",),
    ),
    "registry": (
        "wmtp_modules.registry.__main__",
        "Register, promote, fetch and list models in MLflow's registry.",
        (
            "wmtp registry register runs/rho1_7b my-model --evaluation runs/eval/7b_mbpp",
            "wmtp registry promote my-model",
            "wmtp registry fetch my-model checkpoints/my-model",
            "wmtp registry list my-model",
        ),
    ),
}
VERBATIM = {"ignore_unknown_options": True, "help_option_names": []}


def examples(*lines: str) -> str:
    """The end of a help text; click keeps these lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "wmtp new my_project",
        "wmtp check my_project/config.yaml",
        "wmtp check wmtp/rho1_7b max_steps=100",
        "tune ls",
        "tune run --nproc_per_node 2 rho1_wmtp_distributed --config wmtp/quickstart_rho1",
    ),
)
@click.version_option(package_name="wmtp")
def main() -> None:
    """Fine-tune multi-token-prediction models with token weighting.

    Trainings and evaluations are started by torchtune's `tune run`; this is what stands around
    them. Each command has a --help with examples.
    """


@main.command(epilog=examples("wmtp new my_project"))
@click.argument("folder", metavar="DIR", type=click.Path())
def new(folder: str) -> None:
    """Make a project: a recipe to change, a config, some data and a README.

    It runs at once, on a CPU and without a download: a small model, trained from nothing. DIR must
    not exist, or be empty.
    """
    from wmtp_modules.cli.project import new_project

    try:
        click.echo(new_project(folder))
    except (ValueError, OSError) as error:
        fail(error)


@main.command(
    context_settings={"ignore_unknown_options": True},
    epilog=examples(
        "wmtp check my.yaml",
        "wmtp check wmtp/rho1_7b optimizer.lr=0.0001 --no-files",
        "wmtp check my.yaml --recipe recipes/mine.py environment=cluster",
    ),
)
@click.argument("config", metavar="CONFIG")
@click.argument("overrides", metavar="[key=value | ~key]...", nargs=-1)
@click.option("--recipe", metavar="FILE", help="A recipe, if not the one that CONFIG names.")
@click.option("--no-files", is_flag=True, help="Do not look for checkpoints and tokenizers.")
def check(config: str, overrides: tuple[str, ...], recipe: str | None, no_files: bool) -> None:
    """Say everything that `tune run` would refuse of a config, all at once.

    CONFIG is a YAML file, or the name of one of ours as `tune ls` shows it. It says in the comment
    at its top which recipe it is for: `# recipe: NAME`, or a file. Nothing is trained or written.
    Exit code 0: nothing was found; 1: the lines say what.
    """
    from wmtp_modules.cli.checks import problems_of, recipe_for

    try:
        file = recipe_for(config, recipe)
        problems, missing = problems_of(config, list(overrides), file, files=not no_files)
    except (ValueError, OSError) as error:
        fail(error)
    problems += [f"{key}: must be given a value, such as {key}=..." for key in missing]
    if problems:
        count = f"{len(problems)} error{'s' * (len(problems) > 1)}"
        fail("\n  ".join([f"{config}: {count}", *problems]))
    click.echo(f"{config}: nothing that {file.name} would refuse")


def fail(error: object) -> NoReturn:
    """End with a sentence on stderr and exit code 1."""
    from wmtp_modules.config.secrets import hidden

    click.echo(hidden(str(error)), err=True)
    sys.exit(1)


def _add_program(name: str, module: str, told: str, lines: tuple[str, ...]) -> None:
    @main.command(name, context_settings=VERBATIM, help=told, short_help=told)
    @click.argument("argv", nargs=-1, type=click.UNPROCESSED)
    def run(argv: tuple[str, ...]) -> None:
        words = list(argv)
        if name == "estimate-memory" and words and not words[0].startswith("-"):
            words.insert(0, "--config")  # as the other commands take it
        if {"-h", "--help"} & {*words}:
            click.echo(f"{told}\n\nExamples:\n" + "".join(f"  {line}\n" for line in lines))
        sys.exit(importlib.import_module(module).main(words, prog=f"wmtp {name}"))


for _name, (_module, _told, _lines) in PROGRAMS.items():
    _add_program(_name, _module, _told, _lines)

if __name__ == "__main__":
    main()
