"""Supervised fine-tuning with TRL, which makes the PEFT model itself: patch it in the trainer.

    pip install 'pyfastlora[examples]'
    python examples/trl_sft.py [--model PATH] [--steps 100] [--output DIR]
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from small import load, sums
from trl import SFTConfig, SFTTrainer

import pyfastlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="outputs/trl_sft")
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(sums()),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        args=SFTConfig(
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
    pyfastlora.patch(trainer.model)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']}")
    print(pyfastlora.report(trainer.model))
    trainer.save_model()


if __name__ == "__main__":
    main()
