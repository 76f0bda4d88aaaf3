"""Lets the library be imported on a machine with torch, triton and numpy only.

``gr`` reads configs with PyYAML and tables with pyarrow. A GPU check reads neither, but importing the trainer imports
both; where they are missing, empty stand-ins take their place in this process. Anything asked of them fails or is
meaningless, so this is for this folder's commands alone.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

_PYARROW = ("compute", "csv", "dataset", "parquet", "types", "fs", "ipc")


class _SafeLoader:
    yaml_implicit_resolvers: dict[str, list] = {}

    @classmethod
    def add_implicit_resolver(cls, *_: object) -> None:
        """PyYAML's, doing nothing."""


def install() -> list[str]:
    """Puts stand-ins for what is missing; returns their names."""
    missing = [name for name in ("yaml", "pyarrow") if not _found(name)]
    if "yaml" in missing:
        yaml = ModuleType("yaml")
        yaml.SafeLoader, yaml.YAMLError, yaml.MappingNode = _SafeLoader, Exception, object
        sys.modules["yaml"] = yaml
    if "pyarrow" in missing:
        sys.modules["pyarrow"] = pyarrow = MagicMock(name="pyarrow")
        for part in _PYARROW:
            sys.modules[f"pyarrow.{part}"] = getattr(pyarrow, part)
    return missing


def _found(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None
