"""What `--kernels auto` takes instead of the fused block, from bench/results: `python -m bench.choices [--write]`.

For every GPU and block that was measured, the fastest of the fused block, the single operations and PyTorch (compiled,
where the model is compiled), forward and backward together. Another form than the fused one has to be faster by more
than `MARGIN`, as it keeps more activations. Without `--write` the choices are printed; with it, they replace
fastnet/choices.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from bench.stages import RESULTS, newest_results
from fastnet.choices import FILE, Exceptions, Form

MARGIN = 0.05
MODES: dict[str, dict[Form, str]] = {
    "eager": {form: form for form in get_args(Form)},
    "compiled": {"triton": "triton", "triton-ops": "triton-ops", "torch": "compiled"},
}


def exceptions(results: Path = RESULTS) -> Exceptions:
    """GPU → block → mode → form, where another form than the fused one won."""
    found: Exceptions = {}
    for _, content in newest_results(results):
        for key, by_name in _blocks(content["stages"]).items():
            block = key.rpartition(", batch ")[0]
            for mode, names in MODES.items():
                form = _fastest({form: by_name[name]["seconds"] for form, name in names.items() if name in by_name})
                if form != "triton":
                    found.setdefault(content["machine"]["gpu"], {}).setdefault(block, {})[mode] = form
    return found


def _blocks(stages: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Block → name → timing; only blocks whose fused form was right and was timed."""
    blocks: dict[str, dict[str, Any]] = {}
    for stage in ("blocks", "blocks, compiled"):
        for key, case in stages.get(stage, {}).get("cases", {}).items():
            blocks.setdefault(key, {}).update(case)
    return {key: case for key, case in blocks.items() if "triton" in case}


def _fastest(seconds: dict[Form, float]) -> Form:
    best = min(seconds, key=lambda form: seconds[form])
    return best if seconds[best] < (1 - MARGIN) * seconds["triton"] else "triton"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.choices", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the choices into fastnet/choices.json")
    options = parser.parse_args(arguments)
    text = json.dumps(exceptions(), indent=1, ensure_ascii=False) + "\n"
    if not options.write:
        print(text, end="")
        return 0
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
