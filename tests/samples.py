"""Texts for tests that need one and do not care which."""

import torch

WORDS = "the cat sat on the mat and the dog sat by the door of the old red house while the rain fell".split()


def text(n, seed=1):
    """n characters of words in a random order."""
    dice = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (n,), generator=dice).tolist()
    return " ".join(WORDS[i] for i in chosen)[:n]
