"""What each configuration was compiled to, as one Triton version made it, and which have changed since.

`compile_baseline.json` holds of each configuration and architecture its registers, its shared memory and a key: a hash
of all that its machine code follows from (the kernel's source and that of every function that it calls, without
comments; types, constants, warps, stages; the architecture) and of the rules that it was held to. A configuration
whose key is still the stored one compiles to the same code and keeps the same rules, so it need not be built again to
know it; what broke a rule is stored without a key and is therefore always built.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

BASELINE = Path(__file__).with_suffix(".json")


class Entry(NamedTuple):
    """The figures of one configuration on one architecture."""

    registers: int
    shared: int
    key: str = ""


def load() -> tuple[str, dict[str, Entry]]:
    """(Triton's version, {"sm_90 kernel[…]": entry}); nothing stored is ("", {})."""
    if not BASELINE.exists():
        return "", {}
    stored = json.loads(BASELINE.read_text())
    return stored["triton"], {name: Entry(*values) for name, values in stored["configurations"].items()}


def write(entries: Mapping[str, Entry], triton_version: str) -> None:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
    BASELINE.write_text(f'{{"triton": {json.dumps(triton_version)}, "configurations": {{\n{lines}\n}}}}\n')


def differences(built: Mapping[str, Entry], triton_version: str, *, complete: bool) -> list[str]:
    """Sentences about what differs from the stored figures; none where they are of another Triton version. `complete`:
    what was not built no longer exists."""
    if not BASELINE.exists():
        return [f"{BASELINE.name} is missing: make it with --update-baseline."]
    stored_version, stored = load()
    if stored_version != triton_version:
        return []
    found = [
        f"{name}: registers, shared bytes {list(stored[name][:2])} in the baseline, {list(now[:2])} now."
        for name, now in built.items()
        if name in stored and stored[name][:2] != now[:2]
    ]
    found += [f"{name} is not in the baseline." for name in built if name not in stored]
    if complete:
        found += [f"{name} is in the baseline but no longer selectable." for name in stored if name not in built]
    if found:
        found.append("If the change is meant, store it: python -m bench.compile_report --changed --update-baseline")
    return found


def key_of(spec: Any, arch: int, rules: str) -> str:
    """Hash of what a configuration's machine code follows from, and of the source of the rules that it is held to."""
    bound = spec.shared_bytes and spec.shared_bytes(divmod(arch, 10))
    parts = (arch, source_of(spec.fn), spec.signature, spec.constexprs, spec.attrs, spec.num_warps, spec.num_stages,
             spec.maxnreg, spec.kind, bound, rules)  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def source_of(fn: Any) -> str:
    """The source of a Triton function and of what it calls, without comments and docstrings, and the values of the
    globals that they read. Where a function stands in its file is no part of it, unlike in Triton's own cache key."""
    found: dict[str, str] = {}
    _collect(fn, found)
    return "\n".join(f"{name}: {text}" for name, text in sorted(found.items()))


def plain(source: str) -> str:
    """Python source as the parser reads it: without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _collect(fn: Any, found: dict[str, str]) -> None:
    function = fn.fn
    name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"  # wherever the file lies
    if name in found:
        return
    found[name] = plain(inspect.getsource(function))
    tree = ast.parse(found[name])
    for value_name, value in _referenced(tree, function.__globals__):
        if hasattr(value, "fn") and callable(value.fn):
            if not value.fn.__module__.startswith("triton."):  # Triton's own belongs to its version
                _collect(value, found)
        elif not callable(value) and not isinstance(value, ModuleType):
            found[f"{name}: {value_name}"] = repr(getattr(value, "value", value))


def _referenced(tree: ast.AST, names: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Globals that a function names, also as attributes of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield node.id, names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
                yield node.attr, getattr(module, node.attr, None)
