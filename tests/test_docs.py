"""Documents hold what they say: their code runs, their messages are the program's, and the READMEs
agree."""

import ast
import importlib.util
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(path: Path, language: str | None = None) -> list[str]:
    """Fenced blocks of a document, of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for of, text in found if language in (None, of)]


# ------------------------------------------------------------------- a weighting of your own

AFTER = 'log = utils.get_logger("INFO")\n'


@pytest.fixture(scope="module")
def copied_recipe(tmp_path_factory) -> Path:
    """The recipe with the block of docs/add_a_weighting.md where the page says."""
    code, _ = blocks(DOCS / "add_a_weighting.md", "python")
    before, after = (ROOT / "recipes" / "rho1_wmtp_distributed.py").read_text().split(AFTER)
    path = tmp_path_factory.mktemp("copied") / "mine.py"
    path.write_text(before + AFTER + code + after)
    return path


def test_the_weighting_of_the_page(copied_recipe, monkeypatch):
    """Its own test, and that test fails for weights that are wrong in a way it names."""
    spec = importlib.util.spec_from_file_location("mine", copied_recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _, code = blocks(DOCS / "add_a_weighting.md", "python")
    names = {"torch": torch}
    exec(code, names)
    torch.manual_seed(0)
    names["test_the_weighting"](module.TokenWeighting)
    with pytest.raises(ValueError, match=r"weighting\.gamma must be at least 0, got -1"):
        module.TokenWeighting("focal", gamma=-1)
    calibrate = module.calibrate_log
    for wrong in (
        lambda log_raw, mask, *_: torch.where(mask, log_raw.exp(), 0.0).float(),  # mean not 1
        lambda log_raw, mask, *bounds: calibrate(-log_raw, mask, *bounds),  # turned round
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, "calibrate_log", wrong)
            with pytest.raises(AssertionError):
                names["test_the_weighting"](module.TokenWeighting)


@pytest.mark.slow
def test_a_run_of_the_page(copied_recipe, forks, tmp_path, tiny_tokenizer_path):
    """The copy trains under it and beside a control, with the page's keys."""
    rows = [json.dumps({"text": textwrap.__doc__ * 3 + str(i)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = {"_component_": "wmtp_modules.data.rows_dataset", "source": str(tmp_path / "rows.jsonl")}
    model = {"vocab_size": 512, "num_layers": 5, "n_future_tokens": 4, "num_heads": 2}
    tokenizer = {"_component_": "torchtune.models.llama2.llama2_tokenizer"}
    (page,) = [text for text in blocks(DOCS / "add_a_weighting.md", "yaml") if "focal" in text]
    cfg = yaml.safe_load(page) | {
        **{"output_dir": str(tmp_path / "run"), "device": "cpu", "dtype": "fp32", "seed": 0},
        **{"fp32_master_weights": True, "checkpointer": None, "dataset": data, "dataset_val": data},
        "model": model
        | {"_component_": "wmtp_modules.models.mtp_llama2", "num_kv_heads": 2}
        | {"embed_dim": 32, "max_seq_len": 64},
        "tokenizer": tokenizer | {"path": str(tiny_tokenizer_path), "max_seq_len": 64},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.003},
        **{"batch_size": 2, "gradient_accumulation_steps": 1, "num_warmup_steps": 1},
        **{"clip_grad_norm": 1.0, "max_steps": 3, "run_val_every_n_steps": 3, "keep_last": 1},
        **{"save_every_n_steps": 3, "log_every_n_steps": 1, "compile": False},
        **{"resume_from_checkpoint": False, "max_skipped_steps": 1, "collective_timeout_s": 300},
        **{"activation_checkpointing": "none", "profiler": {"enabled": False}},
        "controls": ["uniform"],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(cfg))
    done = forks.run([copied_recipe, "--config", tmp_path / "mine.yaml"])
    assert done.wait() == [0], done.stderr
    losses = json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_loss"]
    assert {"base", "uniform", "focal"} <= losses.keys()
    assert losses["focal"] != losses["uniform"]


# ------------------------------------------------------------------------------- messages


def literals() -> list[str]:
    """Texts of the source, with … for what an f-string puts in."""
    found = []
    for folder in ("wmtp_modules", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def is_said(message: str, texts: list[str]) -> bool:
    """Whether some text has a message's fixed words in their order."""
    words = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    pattern = re.compile(".*?".join(words), re.DOTALL)
    return any(pattern.search(text) for text in texts)


def test_every_message_of_troubleshooting_is_the_programs():
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 45
    assert len(messages) == len(re.findall(r"^\| `", page, re.MULTILINE))
    texts = literals()
    assert [one for one in messages if not is_said(one, texts)] == []
    assert not is_said("… is not what anybody says", texts)


# -------------------------------------------------------------------------- methods, links


def test_formulas_name_code_that_is_there():
    """``file.py: function`` of methods.md, and papers that the code names too."""
    page = (DOCS / "methods.md").read_text()
    named = re.findall(r"`((?:\w+/)\w+\.py)(?:: ?\n?(\w+))?`", page)
    assert len(named) > 14
    for file, function in named:
        tree = ast.parse((ROOT / "wmtp_modules" / file).read_text())
        names = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
        assert not function or function in names, (file, function)
    sources = "".join(path.read_text() for path in (ROOT / "wmtp_modules").rglob("*.py"))
    packed = {"2404.10830"}  # cross-document attention: of the packing, which names no paper
    for paper in set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", page)) - packed:
        assert paper in sources or paper in "2107.03374", paper


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = path if not name else (path.parent / name).resolve()
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_math_is_what_github_shows():
    """Formulas of their own stand in ``math`` blocks; inline, Markdown takes a backslash before
    punctuation for itself, and dollars come in pairs."""
    for path in documents():
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
        assert "$$" not in text, path
        parts = text.split("$")
        assert len(parts) % 2 == 1, path
        assert [one for one in parts[1::2] if re.search(r"\\[^a-zA-Z]", one)] == [], path
    formulas = blocks(DOCS / "methods.md", "math")
    assert len(formulas) > 8
    for one in formulas:
        assert one.count("{") == one.count("}"), one
        assert one.count(r"\bigl") + one.count(r"\Bigl") == one.count(r"\bigr") + one.count(
            r"\Bigr"
        )


# ------------------------------------------------------------------------- two READMEs

ENGLISH, KOREAN = ROOT / "README.md", DOCS / "README.ko.md"


def sections(path: Path) -> list[str]:
    return re.split(r"^## .+$", path.read_text(), flags=re.MULTILINE)


def test_both_readmes_have_the_same_blocks():
    """Commands and printed figures, in the same order."""
    assert blocks(KOREAN) == blocks(ENGLISH)
    assert len(blocks(ENGLISH)) > 10


def figures(section: str) -> list[str]:
    """Numbers with decimals, per cent, signs and intervals of the prose, in any order: languages
    put them in other places."""
    prose = re.sub(r"^```.*?^```$", "", section, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"\(\S+\)|\[arXiv [^]]+\]|`[^`\n]+`|Python 3\.1\d(?:\.\d+)?", " ", prose)
    return sorted(re.findall(r"[+-]?\d+\.\d+|\d+(?= ?%)|\d{2,}", prose))


def test_both_readmes_have_the_same_figures():
    english, korean = sections(ENGLISH), sections(KOREAN)
    assert len(english) == len(korean)
    for one, other in zip(english, korean, strict=True):
        assert figures(one) == figures(other)
    assert sum(len(figures(one)) for one in english) > 40


def test_both_readmes_lead_to_the_same_places():
    """Each paragraph of links survives a translation: the same documents, from another folder."""

    def targets(path: Path) -> list[Path]:
        found = re.findall(r"\]\(([^)#\s]+)\)", path.read_text())
        return sorted({(path.parent / t).resolve() for t in found if not t.startswith("http")})

    ours = set(targets(ENGLISH)) ^ set(targets(KOREAN))
    assert ours == {ENGLISH, KOREAN}  # each other's
