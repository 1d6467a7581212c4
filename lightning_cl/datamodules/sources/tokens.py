"""Text to token ids of fixed length."""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np

from lightning_cl.core.imports import require

__all__ = ["HashTokenizer", "PretrainedTokenizer", "make_tokenizer"]

# a run of letters and digits, or one mark of punctuation
_WORDS = re.compile(r"\w+|[^\w\s]")


class HashTokenizer:
    """Numbers words by a hash: no vocabulary to learn, store or ship, the same ids on every machine.

    The id of a lower-case word is ``1 + crc32(utf-8 bytes) % (vocab_size - 1)``; 0 is padding. Words that share an id
    cannot be told apart: with ``v`` distinct words, a word meets another with chance of about ``v / vocab_size``.

    Args:
        vocab_size: Number of ids with the padding, at least 2.
        ngrams: Also number the sequences of 2 to ``ngrams`` words; they follow the single words.

    Example:
        >>> ids, mask = HashTokenizer(vocab_size=1000).encode(["What's up?", "UP"], max_length=6)
        >>> ids.tolist(), mask[1].tolist()
        ([[142, 298, 749, 809, 52, 0], [809, 0, 0, 0, 0, 0]], [1, 0, 0, 0, 0, 0])
    """

    def __init__(self, vocab_size: int = 4096, ngrams: int = 1) -> None:
        if vocab_size < 2:
            raise ValueError(f"`vocab_size` must be at least 2 (a padding id and a word), got {vocab_size}.")
        if ngrams < 1:
            raise ValueError(f"`ngrams` must be at least 1, got {ngrams}.")
        self.vocab_size = vocab_size
        self.ngrams = ngrams

    def encode(self, texts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask (1 for a word), int64 ``[len(texts), max_length]``; longer texts are cut at the end."""
        ids = np.zeros((len(texts), max_length), dtype=np.int64)
        known: dict[str, int] = {}
        for row, text in zip(ids, texts, strict=True):
            words = _WORDS.findall(text.lower())
            terms = [
                " ".join(words[start : start + n])
                for n in range(1, self.ngrams + 1)
                for start in range(len(words) - n + 1)
            ][:max_length]
            for term in terms:
                if term not in known:
                    known[term] = 1 + zlib.crc32(term.encode()) % (self.vocab_size - 1)
            row[: len(terms)] = [known[term] for term in terms]
        return ids, (ids != 0).astype(np.int64)


class PretrainedTokenizer:
    """A tokenizer of transformers; where it has no padding token, the end-of-text token pads.

    Args:
        name: Name on the hub or local path.
    """

    def __init__(self, name: str) -> None:
        tokenizer: Any = require("transformers", extra="llm").AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    def encode(self, texts: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask, int64 ``[len(texts), max_length]``; longer texts are cut by the tokenizer's own rule."""
        encoded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=max_length)
        return np.asarray(encoded["input_ids"], np.int64), np.asarray(encoded["attention_mask"], np.int64)


def make_tokenizer(tokenizer: HashTokenizer | str) -> HashTokenizer | PretrainedTokenizer:
    """Return the tokenizer that a setting names: ``"hash"``, or a tokenizer of transformers."""
    if isinstance(tokenizer, HashTokenizer):
        return tokenizer
    return HashTokenizer() if tokenizer == "hash" else PretrainedTokenizer(tokenizer)
