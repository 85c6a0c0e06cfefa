"""LoRA with accelerate: patch first, prepare after. On one process or many:

    accelerate launch examples/accelerate_loop.py [--model PATH] [--steps 100]
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from small import encode, load, sums
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import pyfastlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub; default: a small random Llama")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)

    base, tokenizer = load(options.model)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)
    pyfastlora.patch(model)

    rows = [encode(tokenizer, row) for row in sums()]
    batches = DataLoader(
        rows, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer), drop_last=True
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    step = 0
    while step < options.steps:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if step % 10 == 0:
                mean = accelerator.reduce(loss.detach(), "mean").item()
                accelerator.print(f"step {step} loss {mean:.4f}")
            step += 1
            if step == options.steps:
                break
    accelerator.print(pyfastlora.report(accelerator.unwrap_model(model)))
    accelerator.end_training()


if __name__ == "__main__":
    main()
