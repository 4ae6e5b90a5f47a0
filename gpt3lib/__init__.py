"""How GPT-3 works, in code: the library that the book is made of."""

# Made by tools/export.py from its table of public names; edit that.
from gpt3lib import sizes, weights
from gpt3lib.cache import generate
from gpt3lib.decoding import beam_search, generate_many, write_on
from gpt3lib.embeddings import ContextError
from gpt3lib.files import WeightsError
from gpt3lib.generation import PromptError, generate_slowly
from gpt3lib.model import GPT, ConfigError, GPTConfig
from gpt3lib.sparse_attention import PatternError
from gpt3lib.texts import DataError
from gpt3lib.tokenization import TokenError, Tokenizer

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
