"""LoRA with transformers' Trainer: patch the model before the trainer gets it.

    python examples/hf_trainer.py [--model PATH] [--steps 100] [--output DIR]
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from small import encode, load, sums
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import pyfastlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="outputs/hf_trainer")
    options = parser.parse_args()

    base, tokenizer = load(options.model)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"
    )
    model = get_peft_model(base, config)
    pyfastlora.patch(model)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=True,
            logging_steps=10,
            logging_first_step=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[encode(tokenizer, row) for row in sums()],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']}")
    print(pyfastlora.report(model))
    model.save_pretrained(options.output)  # PEFT's format, as without the patch


if __name__ == "__main__":
    main()
