"""A config calls only what is on the list, and nothing is imported to find that out."""

import ast
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import InterpolationResolutionError, UnsupportedInterpolationType

from wmtp_modules.config.check import Component, ConfigError, Keys, check_config
from wmtp_modules.config.components import VARIABLE, NotAllowedError, locate, todays_name
from wmtp_modules.config.environment import refuse_variables

ROOT = Path(__file__).parents[2]


class Seed(Keys):
    seed: int


class Data(Keys):
    data: Annotated[dict[str, Any], Component()]


class Optimizer(Keys):
    optimizer: Annotated[dict[str, Any], Component(("params",))]


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
        ("wmtp_modules.quickstarts.functions.os.system", "is defined in 'os'"),
        ("wmtp_modules.quickstarts.functions.subprocess.run", "is defined in 'subprocess'"),
        (
            "wmtp_modules.quickstarts.functions.finished_run",
            "is defined in 'wmtp_modules.run.plan'",
        ),
        ("wmtp_modules.data.loader.torch.hub.load", "is defined in 'torch'"),
        ("wmtp_modules.data.rows.json.loads", "is defined in 'json'"),
        ("wmtp_modules.data.rows.FEATURES.encode_example", "is defined in 'datasets"),
        ("wmtp_modules.data.rows.OPTIONAL.index", "is defined in 'builtin"),
        ("wmtp_modules.data.rows.log.info", "is defined in 'logging'"),
        # Nor what is private, wherever it is: in our modules, in others', or of any object.
        ("wmtp_modules.quickstarts.functions._function", "'_function' is private"),
        ("wmtp_modules.quickstart_eval._function", "'_function' is private"),
        ("wmtp_modules.data._private.make", "'_private' is private"),
        ("torch.optim._functional.adam", "'_functional' is private"),
        ("torch.optim.optimizer._get_value", "'_get_value' is private"),
        ("torchtune.models.llama2._model_builders.llama2_7b", "'_model_builders' is private"),
        ("torch.optim.AdamW.__init__.__globals__.clear", "'__init__' is private"),
        ("torch.optim.AdamW.__subclasses__", "'__subclasses__' is private"),
        ("torch.optim.AdamW.__class__", "'__class__' is private"),
        ("wmtp_modules.quickstarts.stdlib.__loader__.load_module", "'__loader__' is private"),
        ("_pytest.outcomes.skip", "'_pytest' is private"),
    ],
)
def test_what_is_not_on_the_list_is_refused(path, match):
    with pytest.raises(NotAllowedError, match=match):
        locate(todays_name(path))


def test_a_private_name_is_refused_before_its_module_is_imported(tmp_path, monkeypatch):
    """Also one in the user's own package, unless the list names it itself."""
    (tmp_path / "own_pack").mkdir()
    for name in ("__init__", "_hidden"):
        (tmp_path / "own_pack" / f"{name}.py").write_text(
            f"open({str(tmp_path / name)!r}, 'w')\ndef make(): pass\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "own_pack")
    with pytest.raises(NotAllowedError, match="'_hidden' is private: a config may not name it"):
        locate("own_pack._hidden.make")
    assert not (tmp_path / "__init__").exists()
    monkeypatch.setenv(VARIABLE, "own_pack,own_pack._hidden")
    assert locate("own_pack._hidden.make").__name__ == "make"
    with pytest.raises(NotAllowedError, match="'__globals__' is private"):
        locate("own_pack._hidden.make.__globals__")


def test_nothing_that_a_config_reaches_evaluates_text():
    """No exec, eval or pickle anywhere but in the sandbox, which is the place for it."""
    seen, files = [], [*ROOT.glob("wmtp_modules/**/*.py"), *ROOT.glob("recipes/*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())) if "sandbox" not in path.parts else ():
            match node:
                case ast.Call(func=ast.Name(id="exec" | "eval" | "__import__" as name)):
                    seen.append((path.name, name))
                case ast.Attribute(attr="system" | "popen" | "unsafe_load" | "full_load" as name):
                    seen.append((path.name, name))
                case ast.Attribute(value=ast.Name(id="pickle"), attr="load" | "loads" as name):
                    seen.append((path.name, name))
                case ast.keyword(arg="shell" | "trust_remote_code" as name, value=value):
                    if not isinstance(value, ast.Constant) or value.value is not False:
                        seen.append((path.name, name))
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if keywords.get("weights_only") != "True":
                        seen.append((path.name, "torch.load"))
    assert len(files) > 80
    assert seen == []


def test_only_these_resolvers_are_there():
    """What ``${...}`` can do: read keys and the environment. ``oc.coerce`` would import modules."""
    assert set(BaseContainer._resolvers) == {
        *("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values"),
        *("oc.env", "oc.select"),
    }
    with pytest.raises(UnsupportedInterpolationType):
        OmegaConf.create({"a": "${eval:1}"}).a  # noqa: B018
    with pytest.raises(InterpolationResolutionError, match="GrammarParseError"):
        OmegaConf.create({"a": "${oc.decode:'open(1)'}"}).a  # noqa: B018


def test_a_value_of_a_config_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "spy_value.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create({"seed": "${oc.coerce:spy_value.X,1}"})
    with pytest.raises(ConfigError, match=r"seed: .* does not resolve \(Unsupported interpol"):
        check_config(config, Seed)
    assert not (tmp_path / "ran").exists()


def test_a_refused_module_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "spy_component.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create({"data": {"_component_": "spy_component.make"}})
    with pytest.raises(ConfigError, match=r"^data\._component_: 'spy_component.make' is not allow"):
        check_config(config, Data)
    nested = {"_component_": "torch.optim.AdamW", "betas": [{"_component_": "spy_component.make"}]}
    with pytest.raises(ConfigError, match=r"optimizer\.betas\[0\]\._component_: .* not allowed"):
        check_config(OmegaConf.create({"optimizer": nested}), Optimizer)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(VARIABLE, "spy_component")
    check_config(config, Data)
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
    found = [file for file in files if re.search(r"register\w*_resolver", file.read_text())]
    # It puts another oc.env in place while it looks where variables go, and then OmegaConf's back.
    assert [file.name for file in found if file.name != "environment.py"] == []


def test_variables_are_themselves_after_the_look(monkeypatch):
    monkeypatch.setenv("PLANTED", "value")
    cfg = OmegaConf.create({"note": "${oc.env:PLANTED}", "tracking": {"uri": "${note}"}})
    with pytest.raises(ConfigError, match="PLANTED"):
        refuse_variables(cfg)
    assert cfg.note == "value"
