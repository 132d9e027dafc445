"""Text to token ids and back."""

from quire.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
