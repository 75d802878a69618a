"""The API's reference as web pages, from the docstrings: `make reference`."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

import pdoc

PACKAGES = ("fastnet", "data_pipeline", "kernels")


def modules() -> list[str]:
    """Every module, those of commands too, but not what runs when it is imported."""
    found = []
    for name in PACKAGES:
        package = import_module(name)
        for exported in package.__all__:
            setattr(package, exported, getattr(package, exported))  # pdoc doesn't see names that load on first use
        inside = pkgutil.walk_packages(package.__path__, f"{name}.")
        found += [name, *(module.name for module in inside if not module.name.endswith("__main__"))]
    return found


if __name__ == "__main__":
    pdoc.render.configure(docformat="markdown")
    pdoc.pdoc(*modules(), output_directory=Path(__file__).parent / "reference")
