"""The curves of a quickstart run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfastlora.trainer.quickstart.compare import Comparison

_PEFT, _FAST, _HELD_OUT = "tab:orange", "tab:blue", "tab:green"


def save_curves(
    path: Path, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], comparison: Comparison
) -> None:
    """Writes a PNG: losses of the run, losses of the comparison, tokens per second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    run, both, speed = figure.subplots(1, 3, width_ratios=(3, 3, 1.6))

    run.plot(
        [e["step"] for e in train], [e["loss"] for e in train], color=_FAST, lw=1, label="training batches"
    )
    run.plot(
        [e["step"] for e in held_out],
        [e["eval_loss"] for e in held_out],
        "o-",
        color=_HELD_OUT,
        label="held out",
    )
    run.set(title="Response loss", xlabel="step", ylabel="loss per token")
    run.legend()

    steps = range(1, len(comparison.peft_losses) + 1)
    both.plot(steps, comparison.peft_losses, color=_PEFT, lw=4, alpha=0.5, label="PEFT")
    both.plot(steps, comparison.fast_losses, color=_FAST, lw=1.2, label="pyfastlora")
    both.set(
        title=f"Same steps, both forwards (largest difference {comparison.largest_difference:.1e})",
        xlabel="step",
        ylabel="loss per token",
    )
    both.legend()

    rates = (comparison.peft_tokens_per_second, comparison.fast_tokens_per_second)
    speed.bar_label(speed.bar(("PEFT", "pyfastlora"), rates, color=(_PEFT, _FAST)), fmt="%.0f")
    speed.set(title=f"Tokens per second ({comparison.speedup:.2f} x)")
    speed.margins(y=0.12)
    figure.savefig(path, dpi=110)
