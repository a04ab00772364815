"""Every command that the documents, the heads of configs and recipes and --help show a user.

They are read from fenced blocks of shell and from `inline code`, and each is taken by the program
that it names, in one folder per document and in the document's order:

- `tune ls`, `cp`, `validate`, `wmtp new`, `check` and the conversion run. Of what is downloaded or
  trained before there is a small checkpoint.
- Of `tune run` the launcher gets all words and starts nothing; its config with the overrides is
  checked as the recipe does. `TO_THE_END` names the tests that run such a command to its end.
- Of other programs the words go through their own parser.

What a command needs that a laptop does not have (`NEEDS`), its document must say: in the command's
comment, in a comment of its block, or in the text right before the block.
"""

import argparse
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf

from wmtp_modules import catalog
from wmtp_modules.checkpoints.write import save_meta
from wmtp_modules.checkpoints.write_hf import write_hf
from wmtp_modules.cli.checks import problems_of, recipe_for
from wmtp_modules.cli.main import PROGRAMS
from wmtp_modules.cli.main import main as wmtp_main
from wmtp_modules.config.environment import file_of
from wmtp_modules.config.file import read_config
from wmtp_modules.models import mtp_from_checkpoint, mtp_llama2
from wmtp_modules.models.lora import LoRA
from wmtp_modules.parallel.sharding import init_adapters_, init_weights_

ROOT = Path(__file__).parents[2]
DOCS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *(ROOT / name for name in ("tests/samples/README.md", "wmtp_modules/cli/project.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
HEADED = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "recipes").glob("[!_]*.py"))]

SHELL = ("bash", "sh", "shell", "console")
STARTS = r"(?:tune|wmtp|uv|python3? -m|pytest|pip|hf|mlflow|vllm|torchrun|vessl|docker)(?= |$)"
STARTS += r"|benchmarks/\w+\.py"
# How a text says what a command needs, in words that its reader sees.
NEEDS = {
    "GPUs": r"(?<!without )\b(?:\d+|one|an?|needs)\s+GPUs?\b",
    "S3": r"\bS3\b",
    "VESSL": r"\bVESSL\b",
    "the hub": r"\bhub\b|\blicence\b",
    "Docker": r"\bDocker\b",
    "Slurm": r"\bSlurm\b",
    "Kubernetes": r"\bKubernetes\b",
}
OF_PROGRAM = {
    **{"vllm": "GPUs", "vessl": "VESSL", "docker": "Docker", "hf": "the hub"},
    **{"sbatch": "Slurm", "kubectl": "Kubernetes"},
}
# The tests that run to its end what is only checked here: a config on a CPU, or a program.
QUICKSTARTS = "tests/nightly/test_quickstarts.py"
TO_THE_END = {
    f"{QUICKSTARTS}::test_rho1_beats_its_controls": (
        "wmtp/quickstart_rho1",
        "wmtp/quickstart_base",
        "wmtp/quickstart_reference",
    ),
    f"{QUICKSTARTS}::test_the_critic_knows_and_its_weights_beat_the_filter": (
        "wmtp/quickstart_critic",
        "wmtp/quickstart_critic_base",
    ),
    f"{QUICKSTARTS}::test_the_evaluated_model_solves_tasks_that_it_has_not_seen": (
        "wmtp/quickstart_eval",
        "wmtp/quickstart_eval_base",
    ),
    "tests/recipes/test_eval_mtp.py::test_ready_made_samples": ("wmtp/eval_score",),
    "tests/recipes/test_eval_mtp.py::test_heldout_counts_are_those_of_the_documents": (
        "wmtp/eval_heldout_loss",
    ),
    "tests/recipes/test_eval_mtp.py::test_decoding_speed_and_its_control": (
        "wmtp/eval_decode_speed",
    ),
    "tests/nightly/test_wheel.py::test_a_new_project_runs": ("project",),
    "tests/memory/test_memory.py::test_the_table": ("wmtp_modules.estimate_memory",),
    "tests/cli/test_doctor.py::test_a_page_shows_rows_as_the_model_sees_them": (
        "wmtp_modules.doctor",
    ),
    "tests/reports/test_compare.py::test_the_command_prints_the_table_and_writes_the_page": (
        "wmtp_modules.reports.compare",
    ),
    "tests/reports/test_run_page.py::test_the_command_draws_and_refuses": (
        "wmtp_modules.reports.run_page",
    ),
    "tests/tracking/test_deliver.py::test_sync_sends_the_rest_of_a_killed_run": (
        "wmtp_modules.sync",
    ),
    "tests/tracking/test_registry.py::test_from_a_run_to_a_folder_that_recipes_take": (
        "wmtp_modules.registry",
    ),
    "tests/config/test_configuration.py::test_what_is_written_is_what_the_classes_say": (
        "wmtp_modules.config.reference",
    ),
}
RUN = {name for names in TO_THE_END.values() for name in names}
# What stands for a user's own in a text.
FORMS = {
    **{
        "CONFIG": "wmtp/quickstart_rho1",
        "C": "wmtp/quickstart_rho1",
        "N": "2",
        "DIR": "my_project",
    },
    **{"SRC": "runs/rho1_7b/best", "DST": "out", "RUN...": "runs/a", "RUN_DIR...": "runs/a"},
    **{
        "BASE": "runs/rho1_7b/best",
        "BASE_HF": "out",
        "FILE": "page.html",
        "[key=value]...": "seed=1",
    },
}


class Shown(NamedTuple):
    where: str
    command: str
    told: str  # what a reader sees with it


# ------------------------------------------------------------------- reading documents


def commands_of(path: Path) -> Iterator[Shown]:
    """Every command that a document or the head of a file shows."""
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    if path.suffix == ".md":
        yield from _of_markdown(text, name)
        return
    head = (
        text.split('"""')[1]
        if path.suffix == ".py"
        else "".join(f"{line.lstrip('# ')}\n" for line in text.splitlines() if line.startswith("#"))
    )
    for found in re.finditer(rf"^(?:.*: |\s*)((?:{STARTS}) .*)$", head, re.M):
        if not _is_prose(found[1]):
            yield Shown(name, found[1], head)


def _is_prose(line: str) -> bool:
    return "`" in line or not line.isascii()


def _of_markdown(text: str, name: str) -> Iterator[Shown]:
    before, paragraph, block, fence = "", [], [], None
    for n, line in enumerate([*text.splitlines(), ""], 1):
        if fence is None and (opened := re.match(r"\s*```(\S*)", line)):
            yield from _inline(paragraph, name)
            before = "\n".join(paragraph) or before
            fence, block, paragraph = opened[1], [], []
        elif fence is not None and line.strip() == "```":
            yield from _fenced(block, fence, before, name)
            fence, before = None, ""
        elif fence is not None:
            block.append((n, line))
        elif line.strip() and not line.startswith(("#", "|")):
            paragraph.append(line)
        else:
            yield from _inline(paragraph, name)
            before, paragraph = "\n".join(paragraph) or before, []
            yield from _inline([line], name)


def _fenced(block: list, fence: str, before: str, name: str) -> Iterator[Shown]:
    """A block's commands; lines that end in a backslash are one."""
    told = "\n".join([before, *(re.findall(r"#.*", line)[0] for _, line in block if "#" in line)])
    joined = ""
    for n, line in block:
        line = line.removeprefix("$ ") if fence == "console" else line
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        command, joined = joined.strip(), ""
        if fence not in SHELL:
            if not fence and re.match(STARTS, command):
                yield Shown(f"{name}:{n}", "", "")  # a block that no highlighter knows as shell
        elif command and not command.startswith("#"):
            yield Shown(f"{name}:{n}", command, told)


def _inline(lines: list[str], name: str) -> Iterator[Shown]:
    told = " ".join(lines)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", told):
        if re.match(STARTS, code):
            yield Shown(name, code, told)


# ---------------------------------------------------------------------- taking commands


class Refused(Exception):
    """A command that its program would not take."""


class Taken(Exception):
    """Raised by a parser that has taken the words, so that nothing runs."""


@pytest.fixture
def take(tmp_path, monkeypatch, capsys, tune, wmtp, launched, small, pytestconfig):
    """take(shown): gives a command to its program; Refused with what is wrong with it."""
    for folder in ("recipes", "configs", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TRACKING_URI", "STORAGE_ENDPOINT"):  # environment=cluster
        monkeypatch.setenv(f"WMTP_{name}", "http://server")
    monkeypatch.setenv("WMTP_STORAGE_ROOT", "s3://bucket/wmtp")
    monkeypatch.setattr(
        runpy,
        "run_path",
        lambda path, **_: launched.append(
            argparse.Namespace(
                training_script=path, training_script_args=sys.argv[1:], module=False
            )
        ),
    )
    monkeypatch.setattr(
        runpy,
        "run_module",
        lambda name, **_: launched.append(
            argparse.Namespace(training_script=name, training_script_args=sys.argv[1:], module=True)
        ),
    )
    return Taker(tmp_path, tune, wmtp, launched, small, pytestconfig, monkeypatch, capsys)


@pytest.fixture
def small(tiny_model_args, tiny_tokenizer_path):
    """small(folder, kind): a small checkpoint in Meta's or Hugging Face's format."""

    def make(folder: Path, kind: str) -> None:
        if kind == "meta":
            model = mtp_llama2(**tiny_model_args)
            init_weights_(model, seed=0)
            save_meta(model, folder, tokenizer_path=tiny_tokenizer_path, dtype=torch.float32)
        else:
            model = mtp_llama2(**tiny_model_args | {"num_layers": 3, "n_future_tokens": 1})
            init_weights_(model, seed=0)
            write_hf(model.state_dict().items(), model.args, folder, tiny_tokenizer_path)

    return make


class Taker:
    """Takes the commands of one document, in one folder."""

    def __init__(self, folder, tune, wmtp, launched, small, pytestconfig, monkeypatch, capsys):
        self.folder, self.tune, self.wmtp, self.launched = folder, tune, wmtp, launched
        self.small, self.pytestconfig, self.monkeypatch = small, pytestconfig, monkeypatch
        self.capsys = capsys

    def __call__(self, shown: Shown) -> None:
        if not shown.command:
            raise Refused("a command in a block of no language: begin the block with ```bash")
        if re.fullmatch(r"for \w+ in .*; do|done", shown.command):  # around a command
            return
        for part in shown.command.split(" && "):
            for words in self._meant(part):
                needs = self._needs(words)
                for one in needs - {None}:
                    if not re.search(NEEDS[one], shown.told, re.I):
                        raise Refused(f"needs {one}, which the text does not say: '(needs {one})'")

    def _meant(self, command: str) -> Iterator[list[str]]:
        """Words without comment and environment; what stands for a user's own has an example."""
        for form, example in FORMS.items():
            command = re.sub(rf"(?<!\S){re.escape(form)}(?!\S)", example, command)
        words = shlex.split(command.replace("\\|", "|").replace("$seed", "0"), comments=True)
        while words and (words[0] == "sudo" or re.match(r"[A-Z_]+=", words[0])):
            words.pop(0)
        either = next((i for i, word in enumerate(words) if "|" in word), None)
        if either is None:
            yield words
        else:
            for one in words[either].split("|"):
                yield [*words[:either], one, *words[either + 1 :]]

    def _needs(self, words: list[str]) -> set[str]:
        if words[:2] == ["uv", "run"]:
            words = words[2:]
            if words[:2] == ["--no-project", "--with"]:
                words = words[3:]
        if words[0].startswith("benchmarks/"):
            words = ["python", *words]
        program, *rest = words
        if program in ("python", "python3") and rest[:2] == ["-m", "pip"]:
            program, rest = "pip", rest[2:]
        method = getattr(self, f"_{program.replace('-', '_')}", None)
        if method is None and program not in OF_PROGRAM:
            raise Refused(
                f"nothing here knows {program!r}: give it to its parser in a method of Taker "
                "(tests/cli/test_commands.py), or name what it needs in OF_PROGRAM"
            )
        found = (method(rest) if method else None) or set()
        return found | ({OF_PROGRAM[program]} if program in OF_PROGRAM else set())

    # ------------------------------------------------------------ torchtune's and ours

    def _tune(self, words: list[str]) -> set[str]:
        command, *rest = words or ["--help"]
        if not rest:  # named, not shown
            if command not in ("ls", "cp", "cat", "run", "validate", "--help"):
                raise Refused(f"`tune {command}` is no command of tune")
            if command == "ls":
                self.tune("ls")
            return set()
        if "..." in rest:  # any recipe
            config = rest[rest.index("--config") + 1]
            rest[rest.index("...")] = str(recipe_for(config))
        self.launched.clear()
        try:
            self.tune(command, *rest)
        except SystemExit as ended:
            told = self.capsys.readouterr().err.rstrip().splitlines()[-1:]
            raise Refused(f"tune ends with {ended.code}: {''.join(told)}") from None
        return self._checked(self.launched[0]) if command == "run" else set()

    def _checked(self, started: argparse.Namespace) -> set[str]:
        """What the run needs that a launcher was told to start."""
        script, (option, config, *overrides) = started.training_script, started.training_script_args
        assert option == "--config"
        file = Path(script.replace(".", "/") + ".py" if started.module else script).absolute()
        if config == "runs/x/config.yaml":  # of a run that the text speaks of
            shutil.copy(catalog.configs()["wmtp/rho1_7b"], self._parent(config))
        if "environment=~/ours.yaml" in overrides:
            shutil.copy(file_of("cluster"), self.folder / "ours.yaml")
        path = catalog.config_file(config)
        same = (file.read_text(), path.read_text() if path.is_file() else config, *overrides)
        if (known := CHECKED.get(same)) is not None:  # under another name, or in another text
            return known
        problems, missing = problems_of(config, overrides, file, files=False)
        if problems or missing:
            raise Refused("; ".join([*problems, *(f"{key}: needs a value" for key in missing)]))
        cfg = read_config(["--config", config, *overrides])
        needs = {"GPUs"} if cfg.device == "cuda" else set()
        said = OmegaConf.to_container(cfg, resolve=True)
        needs |= {"S3"} if re.search(r"'s3://", str(said)) else set()
        if not needs:
            self._runs_to_its_end(config)
        return CHECKED.setdefault(same, needs)

    def _runs_to_its_end(self, config: str) -> None:
        text = catalog.config_file(config).read_text()
        same = [name for name, path in catalog.configs().items() if path.read_text() == text]
        if not same and text == PROJECT.read_text():
            same = ["project"]
        if not same or same[0] not in RUN:
            raise Refused(f"no test runs {config} to its end: name one in TO_THE_END")

    def _wmtp(self, words: list[str]) -> set[str]:
        command, *rest = words or ["check"]
        if command not in wmtp_main.commands:
            raise Refused(f"`wmtp {command}` is no command of wmtp")
        if not rest:
            return set()  # named, not shown
        if command == "new":
            self._new(*rest)
        elif command == "check":
            self._check(rest)
        elif command == "estimate-memory":
            return self._module("wmtp_modules.estimate_memory", ["--config", *rest])
        else:
            return self._module(PROGRAMS[command][0].removesuffix(".__main__"), rest)
        return set()

    def _new(self, folder: str) -> None:
        if MADE:
            shutil.copytree(MADE[0], folder)
        else:
            self.wmtp("new", folder)
            MADE.append(Path(folder).absolute())

    def _check(self, words: list[str]) -> None:
        from click.testing import CliRunner

        said = CliRunner().invoke(wmtp_main, ["check", *words]).output.splitlines()
        wrong = said[1:] or [line for line in said if ": nothing that" not in line]
        if any(": there is no " not in line for line in wrong):  # a checkpoint, on this machine
            raise Refused(" ".join(said))

    def _python(self, words: list[str]) -> set[str]:
        if words[:1] == ["-m"]:
            return self._module(words[1], words[2:]) if words[1:] else set()
        path = ROOT / words[0]
        if not path.is_file():
            raise Refused(f"there is no {words[0]}")
        if len(words) > 1:
            self.monkeypatch.syspath_prepend(path.parent)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            self.monkeypatch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            self.monkeypatch.setattr(sys, "argv", words)
            self._parsed(module.main)
        return set()

    _python3 = _python

    def _module(self, name: str, words: list[str]) -> set[str]:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise Refused(f"there is no module {name}")
        if name == "wmtp_modules.convert":
            if words:
                self._convert(words)
        elif name in RUN:
            if words:
                self._program(
                    f"{name}.__main__" if spec.submodule_search_locations else name, words
                )
        else:
            raise Refused(f"no test runs {name} to its end: name one in TO_THE_END")
        return set()

    def _program(self, name: str, words: list[str]) -> None:
        known, others = self._parsed(importlib.import_module(name).main, words)
        if "config" in known:
            problems, _ = problems_of(known.config, others, self._recipe(known.config), files=False)
            if problems:
                raise Refused("; ".join(problems))

    def _recipe(self, config: str) -> Path:
        if config == "my.yaml" and not Path(config).exists():  # in --help
            shutil.copy(catalog.configs()["wmtp/quickstart_rho1"], config)
        return recipe_for(config)

    def _parsed(self, main, *argv) -> tuple[argparse.Namespace, list[str]]:
        """What a program's own parser makes of the words; it goes no further."""
        parse = argparse.ArgumentParser.parse_known_args

        def known(parser, args=None, namespace=None):
            raise Taken(*parse(parser, args, namespace))

        def all_known(parser, args=None, namespace=None):
            found, others = parse(parser, args, namespace)
            if others:
                parser.error(f"unrecognized arguments: {' '.join(others)}")
            raise Taken(found, others)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", known)
            patch.setattr(argparse.ArgumentParser, "parse_args", all_known)
            # Subparsers are asked by their own parser, through the same methods.
            patch.setattr(argparse._SubParsersAction, "__call__", _subparser(parse))
            try:
                main(*argv)
            except Taken as taken:
                return taken.args
            except SystemExit as ended:
                raise Refused(f"its parser ends with {ended.code}") from None
        raise AssertionError("a program without a parser")

    def _convert(self, words: list[str]) -> None:
        source, target = map(Path, words[:2])
        if "..." in words or not source.exists():  # of a training that the text speaks of
            is_meta = source.name in ("best", "7B_1T_4")
            if not is_meta and words[-1] != "mtp":
                raise Refused(f"nothing before it makes {source}")
            self.small(source, "meta" if is_meta else "hf")
        if "--adapter" in words:
            self._small_adapter(source, Path(words[words.index("--adapter") + 1]))
        shutil.rmtree(target, ignore_errors=True)
        if importlib.import_module("wmtp_modules.convert").main(words):
            raise Refused("the conversion fails")

    def _small_adapter(self, base: Path, folder: Path) -> None:
        model = mtp_from_checkpoint(checkpoint_dir=str(base))
        lora = LoRA(rank=2, base=str(base), save_adapter_only=True)
        model.add_lora(lora, adapter_dtype=torch.float32)
        init_adapters_(model, seed=0)
        save_meta(model, folder, tokenizer_path=base / "tokenizer.model", dtype=torch.float32)

    # --------------------------------------------------------------------- others'

    def _hf(self, words: list[str]) -> None:
        """Its words are taken by its own parser; of what it loads there is a small one."""
        from click.exceptions import ClickException
        from huggingface_hub.cli.hf import app

        command, words = app, list(words)
        try:
            while hasattr(command, "commands"):
                name, command, words = command.resolve_command(_context(command), words)
            given = command.make_context(name, [*words]).params
        except ClickException as error:
            raise Refused(error.format_message()) from None
        if name != "download":
            return
        folder = Path(given["local_dir"])
        patterns = given["include"] or []
        if patterns:
            for pattern in patterns:
                if pattern.endswith("/*"):
                    self.small(folder / pattern[:-2], "meta")
                    (folder / pattern[:-2] / "tokenizer.model").unlink()  # not in Meta's folder
                else:
                    self._parent(folder / pattern).touch()
        else:
            self.small(folder, "hf")

    def _cd(self, words: list[str]) -> None:
        """Into a folder of the reader's."""

    def _cp(self, words: list[str]) -> None:
        done = subprocess.run(["cp", *words], cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr)

    def _export(self, words: list[str]) -> None:
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or (name.startswith("WMTP_") and name not in OURS):
                raise Refused(f"nothing of ours reads {name}")
            if name == "WMTP_ENVIRONMENT":
                file_of(value)

    def _uv(self, words: list[str]) -> None:
        if not words or words == ["run"]:
            return
        if "--extra" in words:
            extra = words[words.index("--extra") + 1]
            if extra not in PYPROJECT["project"]["optional-dependencies"]:
                raise Refused(f"there is no extra {extra!r}")
        self._help("uv", words)

    def _help(self, program: str, words: list[str]) -> None:
        """Takes the words of a program that looks at them before it shows its help."""
        found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if found is None:
            pytest.skip(f"{program} is not installed: an image has no development packages")
        done = subprocess.run([found, *words, "--help"], capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr)

    def _ruff(self, words: list[str]) -> None:
        self._help("ruff", words)

    def _pyrefly(self, words: list[str]) -> None:
        self._help("pyrefly", words)

    def _pre_commit(self, words: list[str]) -> None:
        if words != ["install"]:
            raise Refused("known: pre-commit install")

    def _pip(self, words: list[str]) -> None:
        if words[0] != "install":
            raise Refused("known: pip install")

    def _torchrun(self, words: list[str]) -> None:
        if words:
            raise Refused("show tune run instead")

    def _mlflow(self, words: list[str]) -> None:
        """Its parser takes seconds to import: its options are looked for in its source."""
        source = Path(importlib.util.find_spec("mlflow").origin).parent / "cli"
        text = "".join(path.read_text() for path in source.glob("*.py"))
        text += (source.parent / "utils" / "cli_args.py").read_text()
        for word in words:
            if word.startswith("-") and f'"{word}"' not in text:
                raise Refused(f"mlflow has no {word}")

    def _pytest(self, words: list[str]) -> None:
        parser = self.pytestconfig._parser
        known, unknown = parser.parse_known_and_unknown_args(words)
        marks = {
            mark.partition(":")[0] for mark in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]
        }
        for one in unknown:
            raise Refused(f"pytest has no {one}")
        for path in known.file_or_dir:
            if not (ROOT / path.partition("::")[0]).exists():
                raise Refused(f"there is no {path}")
        if wrong := {*re.findall(r"\w+", known.markexpr or "")} - marks - {"not", "and", "or"}:
            raise Refused(f"no test is marked {wrong}")

    def _parent(self, path) -> Path:
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _context(command):
    import click

    return click.Context(command)


def _subparser(parse):
    def call(self, parser, namespace, values, option_string=None):
        name, words = values[0], values[1:]
        if name not in self._name_parser_map:
            parser.error(f"unknown command {name}")
        found, others = parse(self._name_parser_map[name], words, None)
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        vars(namespace).update(vars(found))

    return call


PROJECT = ROOT / "wmtp_modules" / "cli" / "project.yaml"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = {
    name
    for path in (*(ROOT / "wmtp_modules").rglob("*.py"), *ROOT.glob("configs/environments/*.yaml"))
    for name in re.findall(r"\bWMTP_[A-Z_]+\b", path.read_text())
}


MADE: list[Path] = []  # a project, to be copied
CHECKED: dict[tuple, set[str]] = {}  # what a run of a recipe, a config and overrides needs


def refusals(take, shown) -> list[str]:
    found = []
    for one in shown:
        try:
            take(one)
        except (Refused, ValueError, AssertionError) as error:
            found.append(f"{one.where}: {one.command}\n    {error}")
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_document_is_taken(take, path):
    if path.name == "project.md":  # stands in the folder of what `wmtp new` makes
        take(Shown("", "wmtp new made", ""))
        for one in Path("made").iterdir():
            shutil.copytree(one, one.name) if one.is_dir() else shutil.copy(one, one.name)
    assert not (found := refusals(take, commands_of(path))), "\n".join(found)


def test_every_example_of_help_is_taken(take):
    shown = [line for _, _, lines in PROGRAMS.values() for line in lines]
    for command in (wmtp_main, *wmtp_main.commands.values()):
        shown += re.findall(r"^  ((?:wmtp|tune) .+)$", command.epilog or "", re.M)
    assert len(shown) > 15
    take(Shown("", "wmtp new my_project", ""))
    shutil.copy(catalog.configs()["wmtp/quickstart_rho1"], "my.yaml")
    (take.folder / "recipes").unlink()
    (take.folder / "recipes").mkdir()
    shutil.copy(catalog.recipes()["rho1_wmtp_distributed"], "recipes/mine.py")
    shown = [one for one in shown if one != "wmtp new my_project"]
    told = "on 8 GPUs, S3"
    found = refusals(take, (Shown("--help", one, told) for one in shown))
    assert not found, "\n".join(found)


BROKEN = {
    "tune run eval_mtp --config wmtp/quickstart_eval stagez=[]": "did you mean 'stages'",
    "tune run recipes/rho1_wmtp.py --config configs/quickstart/rho1.yaml": "tune ends with 2",
    "tune run rho1_wmtp_distributed --config wmtp/quickstart_rho": "cannot be read as a config",
    "tune run rho1_wmtp_distributed --config wmtp/quickstart_rho1 --max_steps=1": "not an option",
    "tune run --nproc_per_rank 2 rho1_wmtp_distributed --config wmtp/quickstart_rho1": "tune ends",
    "tune run --nproc_per_node 8 rho1_wmtp_distributed --config wmtp/rho1_7b": "needs GPUs, which",
    "tune run eval_mtp --config wmtp/eval_score": "samples: needs a value",
    "tune cp wmtp/rho1_8b .": "tune ends with 2",
    "tune vallidate my.yaml": "tune ends with 2",
    "wmtp chek my.yaml": "no command of wmtp",
    "wmtp check wmtp/quickstart_rho1 sede=1": "did you mean 'seed'",
    "wmtp compare runs/a --outputs x.html": "its parser ends with 2",
    "wmtp registry promot name": "its parser ends with 2",
    "wmtp estimate-memory wmtp/rho1_7b --rank-count 8": "not an option",
    "python -m wmtp_modules.konvert a b": "there is no module",
    "uv run python -m wmtp_modules.convert runs/x/best out --to hff": "2",
    "uv run python benchmarks/none.py": "there is no benchmarks/none.py",
    "uv run python benchmarks/ablation.py --seed-count 3": "its parser ends with 2",
    "uv run pytest -m nightli": "no test is marked",
    "uv run pytest tests/none.py": "there is no tests/none.py",
    "uv sync --extra rewards": "no extra 'rewards'",
    "uv run ruff check --fixx": "fixx",
    "uv run hf download owner/name --includes x": "--includes",
    "vllm serve runs/hf": "needs GPUs, which",
    "export WMTP_ENVIRONMENTS=cluster": "nothing of ours reads",
    "some-program --flag": "nothing here knows 'some-program'",
    "": "begin the block with ```bash",
}


@pytest.mark.parametrize("command", BROKEN)
def test_a_broken_command_is_refused(take, command):
    with pytest.raises((Refused, ValueError, SystemExit), match=re.escape(BROKEN[command])):
        take(Shown("here", command, "On a laptop without a GPU:"))


def test_what_is_named_as_running_a_command_is_there():
    for one in TO_THE_END:
        file, _, name = one.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(), one


def test_blocks_and_inline_commands_are_found():
    text = (
        "Say `wmtp check\nmy.yaml`, not `x`.\n\nOn 8 GPUs:\n\n```bash\n# needs S3\ntune run a \\\n"
        "  b=1 # why\ncd x\n```\n\n```\nuv sync\n```\n\n```console\n$ pytest -q\n"
        "```\n| `uv build` |\n"
    )
    shown = [*_of_markdown(text, "x.md")]
    assert [one.command for one in shown] == [
        *("wmtp check my.yaml", "tune run a   b=1 # why", "cd x", "", "pytest -q", "uv build"),
    ]
    assert {"On 8 GPUs:", "# needs S3", "# why"} <= {*shown[1].told.splitlines()}
    assert "GPU" not in shown[0].told + shown[4].told


@pytest.mark.parametrize("path", HEADED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_head_is_taken(take, path):
    shown = [*commands_of(path)]
    assert shown or path.parent.name == "environments", "its head shows no command"
    assert not (found := refusals(take, shown)), "\n".join(found)
