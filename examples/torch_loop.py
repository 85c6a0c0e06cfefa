"""LoRA in a loop of one's own: patch the model that get_peft_model returned, and train as before.

    python examples/torch_loop.py [--model PATH] [--steps 100]
"""

from __future__ import annotations

import argparse

import torch
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
    device = "cuda" if torch.cuda.is_available() else "cpu"

    base, tokenizer = load(options.model)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config).to(device)
    pyfastlora.patch(model)

    rows = [encode(tokenizer, row) for row in sums()]
    batches = DataLoader(
        rows, batch_size=16, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer), drop_last=True
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    step = 0
    while step < options.steps:
        for batch in batches:
            loss = model(**batch.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                print(f"step {step} loss {loss.item():.4f}")
            step += 1
            if step == options.steps:
                break
    print(pyfastlora.report(model))


if __name__ == "__main__":
    main()
