"""A small tokenizer of English sentences that falls back on single characters for words that it does not know."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nabla import InputError
from wan.models.wan.components import PAD_TOKEN

END_TOKEN, UNKNOWN_TOKEN = "</s>", "<unk>"
# UMT5's numbers for padding and the end are 0 and 1.
SPECIAL_TOKENS = [PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN]
WORD_BEGINS = "▁"
# All that is printable, in lower case as sentences are: any of it can be spelled, whether captions have it or not.
ALPHABET = [WORD_BEGINS, *sorted(set(map(str.lower, string.printable)) - set(string.whitespace))]
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(ALPHABET)


def train_tokenizer(sentences: Iterable[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Pairs of pieces that are frequent in the sentences, merged (BPE) until there are `vocabulary` pieces.

    Case and accents do not count; characters beyond ASCII become the unknown token. Every sentence ends in the end
    token, and is cut to `length` tokens where a caller asks for truncation.
    Raises `InputError` if the vocabulary cannot hold the characters.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise InputError(f"vocabulary {vocabulary} holds not even the characters; use {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN_TOKEN, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Digits(individual_digits=True),
            # Pieces that begin words are others than those within: "red" is no colour in "tired".
            pre_tokenizers.Metaspace(WORD_BEGINS, prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(WORD_BEGINS, prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, SPECIAL_TOKENS.index(END_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_max_length=length,
    )
