"""The tests see a broken kernel: each mutation of `tests.mutations` makes some of them fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, StaleMutation, copy_tree, run_tests, survives


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutation_fits_the_source(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    changed = mutation.apply(source)
    assert changed != source
    compile(changed, mutation.file, "exec")


def test_text_that_is_not_there_once_is_an_error() -> None:
    mutation = Mutation("name", "file.py", "a", "b", ())
    assert mutation.apply("-a-") == "-b-"
    for source in ("--", "aa"):
        with pytest.raises(StaleMutation, match="not once"):
            mutation.apply(source)


FILES = sorted({m.tests[0] for m in MUTATIONS})


# One file shows that a copy is whole; that the tests pass is seen where they are.
@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=getattr(pytest.mark, "full" if i else "slow")) for i, f in enumerate(FILES)]
)
def test_unbroken_copy_passes(file: str, tmp_path: Path) -> None:
    """All at once that mutations ask of a file: starting pytest takes as long as most of it."""
    selections = sorted({selection for tested, _, selection in (m.tests for m in MUTATIONS) if tested == file})
    copy_tree(tmp_path)
    status, summary = run_tests(tmp_path, (file, "-k", " or ".join(f"({selection})" for selection in selections)))
    assert status == 0, summary


def one_a_selection() -> list[Any]:
    """Each mutation once; of those that the same tests are to see, the first is slow and the others full."""
    seen = set()
    parameters = []
    for m in MUTATIONS:
        mark = pytest.mark.full if m.tests in seen else pytest.mark.slow
        seen.add(m.tests)
        parameters.append(pytest.param(m, id=m.name.replace(" ", "-"), marks=mark))
    return parameters


@pytest.mark.parametrize("mutation", one_a_selection())
def test_mutation_is_seen(mutation: Mutation) -> None:
    alive, summary = survives(mutation)
    assert not alive, summary
