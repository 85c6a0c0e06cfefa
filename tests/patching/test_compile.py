"""A whole patched Llama under torch.compile: one graph, with the values of the eager steps before it.

What could break: a condition, a group or a block that torch.compile cannot trace, or traces as PEFT's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import bitsandbytes
from peft_layers import as_it_is, nf4
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import pyfastlora

from .models import assert_close, lora

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """With all linears but the head changed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **SIZES))
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, change(child))
    model.is_loaded_in_4bit = change is nf4
    return lora(model, target_modules=r".*_proj|.*embed_tokens").train()


def losses_and_gradients(model: nn.Module, run: Callable[..., Any]) -> dict[str, Tensor]:
    tokens = torch.arange(16).view(2, 8)
    model.zero_grad()
    loss = run(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("change", [as_it_is, nf4], ids=["dense", "4-bit"])
def test_a_llama_compiles_without_a_graph_break(change: Callable[[nn.Linear], nn.Module]) -> None:
    if change is nf4:
        bitsandbytes()
    torch._dynamo.reset()
    model = llama(change)
    pyfastlora.patch(model)
    losses_and_gradients(model, model)  # in which the groups are found
    eager = losses_and_gradients(model, model)
    counted = [(row.calls_fused, row.calls_fallback) for row in pyfastlora.report(model)]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(losses_and_gradients(model, compiled), eager)
    found = pyfastlora.report(model)
    assert len(graphs) == 1 and counted == [(2, 0)] * 8
    assert [(row.calls_fused, row.calls_fallback) for row in found] == counted  # nothing ran beside the graph
    regions = {row.region for row in found}
    assert regions == {"embedding", "group q_proj, k_proj, v_proj", "linear", "mlp"}
    nodes = [node for node in graphs[0].graph.nodes if "autograd_function_apply" in str(node.target)]
    assert len(nodes) == len(regions)
