"""Puts recipes, configs and environments into a wheel, below ``wmtp_modules/shipped``.

torchtune owns a top-level ``recipes``, so they cannot lie where they do here, and each is named
there as it is called. An editable install reads those of the clone.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        spec = spec_from_file_location("catalog", root / "wmtp_modules" / "catalog.py")
        assert spec is not None
        assert spec.loader is not None
        catalog = module_from_spec(spec)
        spec.loader.exec_module(catalog)
        for name, path in catalog.files_of_clone(root).items():
            build_data["force_include"][str(path)] = f"wmtp_modules/shipped/{name}"
