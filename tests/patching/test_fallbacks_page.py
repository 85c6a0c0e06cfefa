"""docs/fallbacks.md is what the conditions say today."""

from __future__ import annotations

import re
from pathlib import Path

from pyfastlora.patching import conditions, conditions_embedding, fallbacks

PAGE = Path(__file__).parents[2] / "docs" / "fallbacks.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == fallbacks.markdown(), (
        "python -m pyfastlora.patching.fallbacks > docs/fallbacks.md"
    )


def test_every_condition_has_a_row_and_is_checked() -> None:
    rows = re.findall(r"^\| L(\d+) \| (.+) \| (.+) \|$", fallbacks.markdown(), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == [*range(1, 16), 5, 6, 8, 15]
    assert all(checked.endswith(".") and said for _, checked, said in rows)
    stages = (*conditions.ON_LAYER, *conditions.ON_MODULES, *conditions.ON_TENSORS)
    names = [name for name in vars(conditions) if re.fullmatch(r"l\d+_\w+", name)]
    assert sorted(["l1_exact_type", *(condition.__name__ for condition in stages)]) == sorted(names)
    stages = (*conditions.ON_LAYER, *conditions_embedding.ON_MODULES, *conditions_embedding.ON_TENSORS)
    here = {"l1_exact_type", "l7_dropout", *(condition.__name__ for condition in stages)}
    assert here == set(names)  # an embedding's are called what they are called for linears
