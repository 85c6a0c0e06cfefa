"""Autograd regions: several PEFT operations as one node, with the formulas written out.

`projections` holds linears that share an input, `mlp` a gated feed-forward block made of them, `embedding` an
adapted embedding, `cross_entropy` the loss of a language model's head in chunks of tokens. Each file states
its forward, every gradient and what it saves.
"""
