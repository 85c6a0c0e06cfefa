"""The rows of one process among several, as many for each: what is evaluated together is stepped together."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from pyfastlora.trainer.data.tokenise import IGNORED


class EvenShare(Dataset[Any]):
    """Every `count`-th row of a dataset from row `rank` on; the last may be one that counts nothing."""

    def __init__(self, data: Any, rank: int, count: int) -> None:
        self._data, self._rank, self._count = data, rank, count

    def __len__(self) -> int:
        return (len(self._data) + self._count - 1) // self._count

    def __getitem__(self, i: int) -> Any:
        at = i * self._count + self._rank
        if at < len(self._data):
            return self._data[at]
        row = self._data[0]
        return [_untrained(sample) for sample in row] if isinstance(row, list) else _untrained(row)


def _untrained(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "labels": [IGNORED] * len(sample["labels"])}
