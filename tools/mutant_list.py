"""Mutants by hand, where the change hides in words that no syntax tree looks into: patterns, queries, options.

Each is (module, what stands there, what to put instead), and what stands there stands there once.
"""

BY_HAND = [
    ("texts", " --hash=sha256:{sha256}", ""),
    ("texts", ', "--no-deps"]', "]"),
    ("texts", '"--only-binary=:all:",', ""),
    ("texts", 'os.environ.get("GPT3LIB_CACHE")', 'os.environ.get("GPT3_CACHE")'),
    ("texts", 'm[1].strip("[] ")', "m[1]"),
    ("texts", "ORDER BY ChapterID, VerseID", "ORDER BY VerseID, ChapterID"),
    ("texts", "FROM Books ORDER BY 1, 2", "FROM Books ORDER BY 3, 2"),
    ("texts", "{first} {second}", "{first}"),
    ("tokenization", r"\s+(?!\S)|\s+", r"\s+"),
    ("tokenization", "'(?:[sdmt]|ll|ve|re)", "'(?i:[sdmt]|ll|ve|re)"),
    ("tokenization", r"| ?\p{N}+|", r"| ?\p{N}|"),
    ("tokenization", 'decode("utf-16", "replace")', 'decode("utf-16", "ignore")'),
    ("tokenization", 'errors="replace")', 'errors="ignore")'),
    ("tokenization", " or left + right in known", ""),
]
