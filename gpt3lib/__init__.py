"""How GPT-3 works, in code: the library that the book is made of."""

# Made by tools/export.py from its table of public names; edit that.
from importlib import import_module

HOMES = {
    "generate": "cache",
    "beam_search": "decoding",
    "generate_many": "decoding",
    "write_on": "decoding",
    "ContextError": "embeddings",
    "WeightsError": "files",
    "PromptError": "generation",
    "generate_slowly": "generation",
    "GPT": "model",
    "ConfigError": "model",
    "GPTConfig": "model",
    "PatternError": "sparse_attention",
    "DataError": "texts",
    "TokenError": "tokenization",
    "Tokenizer": "tokenization",
}  # public name: its module
__all__ = [
    "ConfigError",
    "ContextError",
    "DataError",
    "GPT",
    "GPTConfig",
    "PatternError",
    "PromptError",
    "TokenError",
    "Tokenizer",
    "WeightsError",
    "beam_search",
    "generate",
    "generate_many",
    "generate_slowly",
    "sizes",
    "weights",
    "write_on",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    """A public name or a module, at its first use: torch takes a second to import."""
    module = f"gpt3lib.{HOMES.get(name, name)}"
    try:
        if name.startswith("_"):
            raise ModuleNotFoundError(name=module)
        value = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        message = f"module 'gpt3lib' has no attribute {name!r}"
        raise AttributeError(message) from None
    globals()[name] = getattr(value, name) if name in HOMES else value
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
