"""Text and synthetic tasks: corpora, tokenizers, and batches that depend only on seed and step."""

from explore.data.batches import IGNORED, Batch, Source, TextSource
from explore.data.config import DataConfig, RecallData, TextData
from explore.data.corpora import Corpus, load_corpus
from explore.data.known import CORPORA, KnownCorpus
from explore.data.recall import RecallSource
from explore.data.splits import SPLITS, Split
from explore.data.tokenizer import (
    EOT,
    TOKENIZERS,
    Tokenizer,
    check_vocab_size,
    cut_at_blanks,
    load_tokenizer,
    tokenizer_json,
    train_bpe,
)
from explore.data.tokens import TokenStream, token_streams

__all__ = [
    "CORPORA",
    "EOT",
    "IGNORED",
    "SPLITS",
    "TOKENIZERS",
    "Batch",
    "Corpus",
    "DataConfig",
    "KnownCorpus",
    "RecallData",
    "RecallSource",
    "Source",
    "Split",
    "TextData",
    "TextSource",
    "TokenStream",
    "Tokenizer",
    "check_vocab_size",
    "cut_at_blanks",
    "load_corpus",
    "load_tokenizer",
    "token_streams",
    "tokenizer_json",
    "train_bpe",
]
