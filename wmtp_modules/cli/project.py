"""Makes a project of a user's own: recipe, config, some data, a README; it runs as it stands."""

import shlex
import shutil
import tempfile
from pathlib import Path

from wmtp_modules.catalog import recipes
from wmtp_modules.quickstarts.stdlib import deal_files, train_tokenizer, write_rows

RECIPE = "rho1_wmtp_distributed"
CONFIG = Path(__file__).with_name("project.yaml")
VOCABULARY = 512  # as the config has it
SHARES = {"train": 0.15, "heldout": 0.05}  # of the standard library's files
CHARACTERS = 2_000  # of each: a stub, to be replaced
README = Path(__file__).with_name("project.md")


def new_project(folder: str | Path) -> str:
    """Make a project in a new or empty folder; returns what to do next.

    Raises:
        ValueError: if there is something in the folder.
        OSError: if it cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give a new one")
    parts = deal_files(SHARES, seed=0)
    rows = {name: [text[:CHARACTERS] for text in part.values()] for name, part in parts.items()}
    # Made elsewhere: DIR may be the current folder, and sentencepiece splits paths at commas.
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "project")
        data = made / "data"
        data.mkdir(parents=True)
        for name, texts in rows.items():
            write_rows(data / f"{name}.jsonl", [{"text": text} for text in texts])
        train_tokenizer(data, rows["train"], VOCABULARY)
        (data / "tokenizer.vocab").unlink(missing_ok=True)
        # copyfile: an installed file may be read-only, this one is to be changed.
        shutil.copyfile(recipes()[RECIPE], made / "recipe.py")
        shutil.copyfile(CONFIG, made / "config.yaml")
        readme = README.read_text("utf-8").replace("NAME", folder.absolute().name, 1)
        (made / "README.md").write_text(readme, "utf-8")
        shutil.copytree(made, folder, dirs_exist_ok=True)
    return (
        f"{folder}: recipe.py, config.yaml, data/ and README.md. To run it:\n"
        f"  cd {shlex.quote(str(folder))}\n  tune run recipe.py --config config.yaml"
    )
