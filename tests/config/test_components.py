"""A config calls only what is on the list, and nothing is imported to find that out."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wmtp_modules.config.check import Component, ConfigError, check_config
from wmtp_modules.config.components import VARIABLE, NotAllowedError, locate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_component_is_allowed(path):
    def components(node):
        if isinstance(node, dict):
            yield from [node["_component_"]] if "_component_" in node else []
            for value in node.values():
                yield from components(value)

    for component in components(OmegaConf.to_container(OmegaConf.load(path))):
        assert callable(locate(component))


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("os.system", "A config may only name what is defined in torch.optim, torchao.optim"),
        ("builtins.eval", "add it to the environment variable: WMTP_ALLOWED_COMPONENTS=builtins"),
        ("subprocess.run", "may only name"),
        ("torch.load", "may only name"),
        ("torch.optimx.AdamW", r"did you mean 'torch\.optim\.AdamW'"),
        ("torch.optm.AdamW", r"did you mean 'torch\.optim\.AdamW'"),
        ("wmtp_modules.convert.convert", "may only name"),
        # What a module of the list has imported is no part of it.
        (
            "wmtp_modules.run.metric_logging.subprocess.run",
            "'wmtp_modules.run.metric_logging.subprocess' is defined in 'subprocess'",
        ),
        (
            "wmtp_modules.quickstarts.stdlib.Path",
            "'wmtp_modules.quickstarts.stdlib.Path' is defined in 'pathlib",
        ),
        ("torch.optim.swa_utils.torch.load", "is defined in 'torch'"),
        ("wmtp_modules.data.sources.datasets.load_dataset", "is defined in 'datasets'"),
        ("wmtp_modules.quickstarts.stdlib.new_folder", "is defined in 'wmtp_modules.files'"),
        # Nor what any object has.
        ("torch.optim.AdamW.__init__.__globals__.clear", "is defined in 'builtin"),
        ("torch.optim.AdamW.__subclasses__", "is defined in 'builtin"),
        ("torch.optim.AdamW.__class__", "is defined in 'builtins'"),
        ("wmtp_modules.quickstarts.stdlib.__loader__.load_module", "is defined in"),
    ],
)
def test_what_is_not_on_the_list_is_refused(path, match):
    with pytest.raises(NotAllowedError, match=match):
        locate(path)


def test_a_refused_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "spy_component.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create({"data": {"_component_": "spy_component.make"}})
    with pytest.raises(ConfigError, match=r"^data\._component_: 'spy_component.make' is not allow"):
        check_config(config, {"data": Component()})
    nested = {"_component_": "torch.optim.AdamW", "betas": [{"_component_": "spy_component.make"}]}
    with pytest.raises(ConfigError, match=r"optimizer\.betas\[0\]\._component_: .* not allowed"):
        check_config(OmegaConf.create({"optimizer": nested}), {"optimizer": Component(("params",))})
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(VARIABLE, "spy_component")
    check_config(config, {"data": Component()})
    assert (tmp_path / "ran").exists()


def test_the_user_extends_the_list_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine_all.py").write_text("from json import loads\ndef make(): pass\n")
    (tmp_path / "mine_one.py").write_text("from json import loads, dumps\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotAllowedError, match=r"WMTP_ALLOWED_COMPONENTS=mine_all\.make"):
        locate("mine_all.make")
    monkeypatch.setenv(VARIABLE, " mine_all, mine_one.loads ,")
    assert locate("mine_all.make").__name__ == "make"
    assert locate("mine_one.loads").__module__ == "json"  # named itself, wherever it is from
    for path in ("mine_all.loads", "mine_one.dumps", "mine_allx.make"):
        with pytest.raises(NotAllowedError):
            locate(path)


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("nothing_here.x", "no module 'nothing_here'"),
        ("torch..x", "not a dotted path"),
        ("json.decoder.Nope", "'json.decoder' has no 'Nope'"),
        ("json.nope", "'json' has no 'nope'"),
        ("failing_import", "importing 'failing_import' raises ZeroDivisionError"),
        ("needy_import.x", "'needy_import' needs 'not_installed_anywhere'"),
    ],
)
def test_locate_says_what_is_wrong(path, match, tmp_path, monkeypatch):
    (tmp_path / "failing_import.py").write_text("1 / 0")
    (tmp_path / "needy_import.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "nothing_here,json,failing_import,needy_import")
    with pytest.raises(ImportError, match=match):
        locate(path)


def test_locate_imports_submodules(monkeypatch):
    import xml.sax.handler

    monkeypatch.setenv(VARIABLE, "xml.sax")
    assert locate("xml.sax.handler.ContentHandler") is xml.sax.handler.ContentHandler


@pytest.mark.parametrize("folder", ["recipes", "wmtp_modules"])
def test_nothing_of_ours_registers_a_resolver(folder):
    """``${oc.env:X}`` reads the environment and runs nothing; a resolver of ours could."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert not [file for file in files if re.search(r"register\w*_resolver", file.read_text())]
