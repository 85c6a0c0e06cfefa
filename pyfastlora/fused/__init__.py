"""Autograd regions: several PEFT operations as one node, with the formulas written out.

`projections` holds linears that share an input, `mlp` a gated feed-forward block made of them, `embedding` an
adapted embedding. Each file states its forward, every gradient and what it saves.
"""
