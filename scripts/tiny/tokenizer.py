"""The tokenizer of quire-tiny: byte-level BPE in which every digit is a token of its own.

Digits stand alone so that the columns of a sum stand in the sequence (Nogueira et al. 2021 show what
that does for arithmetic).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny.data import training_stream
from tiny.sample import Sample

VOCAB_SIZE = 1024
CORPUS_SAMPLES = 20_000
END = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END)
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
SPLIT = r"[^\S\n]?[\p{L}_]+|\p{N}|[^\S\n]?[^\s\p{L}\p{N}]+|\s+"


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train on the tasks' own text; every byte is in the alphabet, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(MARKERS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = itertools.islice(training_stream(seed), CORPUS_SAMPLES)
    tokenizer.train_from_iterator((_text(sample) for sample in samples), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=SPECIAL_TOKENS[0])
    fast.add_tokens([_added(marker) for marker in MARKERS])
    fast.chat_template = (Path(__file__).parent / "template.jinja").read_text().strip()
    return fast


def prompt_ids(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[int]:
    """The prompt as the shipped template renders it."""
    text = render(tokenizer, sample)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def render(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    """The prompt's text."""
    text: str = tokenizer.apply_chat_template(
        list(sample.messages),
        tools=list(sample.tools) or None,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=sample.thinking,
    )
    return text


def answer_ids(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> list[int]:
    """The answer and the token that ends it."""
    ids: list[int] = tokenizer.encode(sample.answer + END, add_special_tokens=False)
    return ids


def _added(marker: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(marker, special=False, normalized=False)


def _text(sample: Sample) -> str:
    tools = "\n".join(str(tool).replace("'", '"') for tool in sample.tools)
    return "\n".join([tools, *(str(message["content"]) for message in sample.messages), sample.answer])
