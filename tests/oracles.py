"""Independent models for the tests to agree with. Stable: several test files import it.

to_gpt2(model, attention="eager") returns Hugging Face's GPT2LMHeadModel with a copy of the weights of a
gpt3lib GPT; named_like_ours(theirs) returns anything it stores (weights, gradients) under our names.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt3lib import GPTConfig

LINEARS = {"attention.wo": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # stored (in, out) by them
NORMS = {"ln_1": "ln_1", "ln_2": "ln_2"}


def to_gpt2(model, attention: str = "eager") -> GPT2LMHeadModel:
    """A GPT2LMHeadModel in evaluation mode with a copy of `model`'s weights.

    model: a gpt3lib.model.GPT with dense layers, or bands that cover the context;
    attention: "eager" or "sdpa", their two implementations.
    Every weight of theirs is written: loading is strict.
    """
    c = model.config
    assert set(c.kinds) == {"dense"} or c.n_ctx <= c.bandwidth, "GPT-2 has no banded layers"
    assert type(c) is GPTConfig, "other people's models are not all GPT-2"
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_ctx, n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads
    )
    config._attn_implementation = attention
    theirs = GPT2LMHeadModel(config).to(next(model.parameters()).dtype).eval()
    assert theirs.config._attn_implementation == attention
    ours, weights = model.state_dict(), {}
    for table in ("wte", "wpe"):
        weights[f"{table}.weight"] = ours[f"embeddings.{table}.weight"]
    for part in ("weight", "bias"):
        weights[f"ln_f.{part}"] = ours[f"ln_f.{part}"]
        for i in range(c.n_layers):
            qkv = torch.cat([ours[f"blocks.{i}.attention.w{letter}.{part}"] for letter in "qkv"])
            weights[f"h.{i}.attn.c_attn.{part}"] = transposed(qkv)
            for our, their in LINEARS.items():
                weights[f"h.{i}.{their}.{part}"] = transposed(ours[f"blocks.{i}.{our}.{part}"])
            for our, their in NORMS.items():
                weights[f"h.{i}.{their}.{part}"] = ours[f"blocks.{i}.{our}.{part}"]
    theirs.transformer.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True)
    return theirs


def named_like_ours(theirs: GPT2LMHeadModel, get=lambda parameter: parameter.grad) -> dict[str, torch.Tensor]:
    """What `get` takes from each parameter of theirs (its gradient, unless told otherwise), under our names."""
    found = {name: get(parameter) for name, parameter in theirs.transformer.named_parameters()}
    ours = {f"embeddings.{table}.weight": found[f"{table}.weight"] for table in ("wte", "wpe")}
    for part in ("weight", "bias"):
        ours[f"ln_f.{part}"] = found[f"ln_f.{part}"]
        for i in range(theirs.config.n_layer):
            qkv = transposed(found[f"h.{i}.attn.c_attn.{part}"]).chunk(3)
            ours |= {f"blocks.{i}.attention.w{letter}.{part}": third for letter, third in zip("qkv", qkv)}
            for our, their in LINEARS.items():
                ours[f"blocks.{i}.{our}.{part}"] = transposed(found[f"h.{i}.{their}.{part}"])
            for our, their in NORMS.items():
                ours[f"blocks.{i}.{our}.{part}"] = found[f"h.{i}.{their}.{part}"]
    return ours


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix turned over; a vector as it is."""
    return tensor.T.contiguous() if tensor.dim() == 2 else tensor
