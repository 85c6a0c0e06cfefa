"""What a job tells while it trains: everything to log.jsonl, and the same numbers to whoever watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pyfastlora.trainer.console import Console
from pyfastlora.trainer.record import shown
from pyfastlora.trainer.run_dir import RunDir

if TYPE_CHECKING:
    from pyfastlora.trainer.live import LiveView


class Progress:
    """Listener of a job: log.jsonl always; a live view on a terminal, a line per record elsewhere."""

    def __init__(self, run_dir: RunDir, console: Console) -> None:
        self._run_dir, self._console = run_dir, console
        self._total: int | None = None
        self._view: LiveView | None = None
        self._tokens = self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run, evaluations left out."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the live view for the time of a with block, where somebody watches."""
        with self._console.live() as self._view:
            yield

    def started(self, total_steps: int) -> None:
        self._total = total_steps
        self.stepped(0)

    def stepped(self, step: int) -> None:
        if self._view is not None:
            self._view.stepped(step, self._total)

    def logged(self, event: str, values: dict[str, Any]) -> None:
        self._run_dir.log(event, values)
        if event == "eval":
            self._console.say(f"step {values['step']}: held-out loss {values['eval_loss']:.4f}")
            return
        if event == "spike":
            samples = ", ".join(map(str, values.get("samples", [])[:8]))
            spike = f"loss {values['loss']:.4f} is a spike; samples {samples}"
            self._console.say(f"step {values['step']}: {spike}")
            return
        self._tokens += values["tokens"]
        self._seconds += values["seconds"]
        numbers = shown(values)
        if self._view is not None:
            self._view.show({"step": f"{values['step']}/{self._total}", **numbers})
        else:
            text = ", ".join(f"{name} {value}" for name, value in numbers.items())
            self._console.say(f"step {values['step']}/{self._total}: {text}")
