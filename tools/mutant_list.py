"""The mutants: (module, what stands there, what to put instead), each a mistake that somebody once made."""

MUTANTS = [
    ("attention", "ones.tril(n_keys - n_queries)", "ones.tril(n_keys - n_queries + 1)"),  # sees the answer
    ("attention", "ones.tril(n_keys - n_queries)", "ones.tril(n_keys - n_queries - 1)"),  # blind to itself
    ("attention", "k.transpose(-2, -1) / math.sqrt(q.shape[-1])", "k.transpose(-2, -1)"),  # no scale
    ("attention", "is_causal=True", "is_causal=False"),  # no mask
]
