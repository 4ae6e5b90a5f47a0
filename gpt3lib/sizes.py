"""Eight sizes of GPT-3 and five smaller ones, counted; where the 175 billion live."""

# Made from book/07_sizes.ipynb by tools/export.py; edit the chapter.
from gpt3lib.model import SIZES

# name: (n_layers, d_model, n_heads, d_head) as printed in [B20] Table 2.1
TABLE_2_1 = {
    "gpt3-125m": (12, 768, 12, 64),
    "gpt3-350m": (24, 1024, 16, 64),
    "gpt3-760m": (24, 1536, 16, 96),
    "gpt3-1.3b": (24, 2048, 24, 128),
    "gpt3-2.7b": (32, 2560, 32, 80),
    "gpt3-6.7b": (32, 4096, 32, 128),
    "gpt3-13b": (40, 5140, 40, 128),
    "gpt3-175b": (96, 12288, 96, 128),
}


# two rows contradict themselves; Table D.1 settles both
ERRATA = {"gpt3-1.3b": (24, 2048, 16, 128), "gpt3-13b": (40, 5120, 40, 128)}


# named by the parameters of their layers, as [B20] Fig. 3.1 counts
EXTRA_SMALL = {
    "gpt3-100k": (2, 64, 4, 16),
    "gpt3-300k": (4, 80, 5, 16),
    "gpt3-1m": (5, 128, 4, 32),
    "gpt3-3m": (6, 192, 6, 32),
    "gpt3-10m": (8, 320, 10, 32),
}


def fields(shape: tuple[int, int, int, int], **others: int) -> dict[str, int]:
    """A row of a table, and what else is known, as fields of GPTConfig."""
    return dict(zip(("n_layers", "d_model", "n_heads", "d_head"), shape)) | others


PAPER = {"vocab_size": 50257, "n_ctx": 2048}
OURS = {"vocab_size": 4353, "n_ctx": 1024, "bandwidth": 128}
SIZES.update({name: fields(row, **PAPER) for name, row in (TABLE_2_1 | ERRATA).items()})
SIZES.update({name: fields(row, **OURS) for name, row in EXTRA_SMALL.items()})
