"""The sizes: eight counted against the paper's two tables, five of our own, and names that no model has."""

from dataclasses import replace

import pytest
import torch

from gpt3lib.model import GPT, ConfigError, GPTConfig
from gpt3lib.sizes import ERRATA, EXTRA_SMALL, TABLE_2_1

# typed from [B20] Table 2.1 (layers, width, heads, head width), two rows corrected, with the counts they imply
SIZES = {
    "gpt3-125m": (12, 768, 12, 64, 125_226_240),
    "gpt3-350m": (24, 1024, 16, 64, 355_871_744),
    "gpt3-760m": (24, 1536, 16, 96, 760_300_032),
    "gpt3-1.3b": (24, 2048, 16, 128, 1_315_723_264),
    "gpt3-2.7b": (32, 2560, 32, 80, 2_651_553_280),
    "gpt3-6.7b": (32, 4096, 32, 128, 6_658_404_352),
    "gpt3-13b": (40, 5120, 40, 128, 12_853_386_240),
    "gpt3-175b": (96, 12288, 96, 128, 174_604_259_328),
}


def closed_formula(c):
    """12 L d² + 13 L d + (V + n_ctx + 2) d."""
    return (12 * c.d_model + 13) * c.n_layers * c.d_model + (c.vocab_size + c.n_ctx + 2) * c.d_model


@pytest.mark.parametrize("name", SIZES)
def test_the_eight_sizes(name):
    *shape, count = SIZES[name]
    config = GPTConfig.from_name(name)
    assert [config.n_layers, config.d_model, config.n_heads, config.d_head] == shape
    assert (config.vocab_size, config.n_ctx, config.d_ff) == (50257, 2048, 4 * shape[1])
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == count == closed_formula(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    for pattern in (("dense",), ("banded",), ("banded", "banded", "dense")):
        with torch.device("meta"):
            assert GPT(replace(config, attention=pattern, bandwidth=100)).num_params() == count
    if name == "gpt3-175b":
        assert sum(p.numel() for p in model.blocks[95].parameters()) == 1_812_099_072
        assert sum(p.dim() == 2 for p in model.parameters()) == 578


def test_the_printed_table_is_kept_beside_the_errata():
    assert TABLE_2_1["gpt3-1.3b"] == (24, 2048, 24, 128) and TABLE_2_1["gpt3-13b"] == (40, 5140, 40, 128)
    assert TABLE_2_1.keys() == SIZES.keys() and ERRATA.keys() == {"gpt3-1.3b", "gpt3-13b"}
    for name in TABLE_2_1.keys() - ERRATA.keys():
        assert TABLE_2_1[name] == SIZES[name][:4]


@pytest.mark.parametrize("name, wanted", [("100k", 1e5), ("300k", 3e5), ("1m", 1e6), ("3m", 3e6), ("10m", 1e7)])
def test_extra_small_models_are_named_by_their_layers(name, wanted):
    config = GPTConfig.from_name(f"gpt3-{name}")
    with torch.device("meta"):
        model = GPT(config)
    layers = model.num_params() - (config.vocab_size + config.n_ctx) * config.d_model
    assert abs(layers / wanted - 1) < 0.25
    assert (config.vocab_size, config.n_ctx, config.bandwidth) == (4353, 1024, 128) and len(EXTRA_SMALL) == 5


def test_from_name():
    assert GPTConfig.from_name("gpt3-1m") == GPTConfig(4353, 1024, 5, 128, 4, 32, bandwidth=128)
    assert GPTConfig.from_name("gpt3-125m", vocab_size=999, n_ctx=77) == GPTConfig(999, 77, 12, 768, 12, 64)
    with pytest.raises(ConfigError, match="no model is called 'gpt3-2b'; there are gpt3-125m, .*gpt3-10m"):
        GPTConfig.from_name("gpt3-2b")
    with pytest.raises(ConfigError, match="n_ctx is 0"):
        GPTConfig.from_name("gpt3-1m", n_ctx=0)
    with pytest.raises(ConfigError, match="vocab_size is 0"):
        GPTConfig.from_name("gpt3-1m", vocab_size=0)
