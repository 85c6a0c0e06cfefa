"""Preference tuning with TRL. The reference model is the base with its adapter switched off: PEFT's forward.

`import pyfastlora.auto` patches what TRL makes; nothing else differs from a script without pyfastlora.

    pip install 'pyfastlora[examples]'
    python examples/trl_dpo.py [--model PATH] [--steps 100] [--output DIR]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import LoraConfig
from small import load, sums
from trl import DPOConfig, DPOTrainer

import pyfastlora.auto


def preferences() -> Dataset:
    """The sum is preferred to a refusal."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"}
            for row in sums()
        ]
    )


def main(arguments: Sequence[str] | None = None) -> DPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="outputs/trl_dpo")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model)
    trainer = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=preferences(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            logging_first_step=True,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']}")
    print(pyfastlora.report(trainer.model))
    return trainer


if __name__ == "__main__":
    main()
