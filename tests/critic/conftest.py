"""Fixtures of the critic tests."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def make_reward_model() -> Callable[..., Path]:
    """The function of ``reward_model_factory.py``, loaded by path: tests are no package."""
    pytest.importorskip("transformers", reason="the reward extra is not installed")
    path = Path(__file__).with_name("reward_model_factory.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_reward_model


@pytest.fixture(scope="session")
def reward_model_folder(make_reward_model, tmp_path_factory) -> Path:
    """A tiny reward model; copy it before you change it."""
    return make_reward_model(tmp_path_factory.mktemp("reward_model"))
