"""Text and synthetic tasks: corpora, tokenizers, and batches that depend on the seed and the step alone."""

from explore.data.batches import IGNORED, Batch, Source, TextSource
from explore.data.config import DataConfig, RecallData, TextData
from explore.data.corpora import Corpus, load_corpus
from explore.data.known import CORPORA, KnownCorpus
from explore.data.recall import RecallSource
from explore.data.splits import SPLITS, Split
from explore.data.tokenizer import EOT, TOKENIZERS, Tokenizer, load_tokenizer, train_bpe
from explore.data.tokens import TokenStream, token_stream

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
    "load_corpus",
    "load_tokenizer",
    "token_stream",
    "train_bpe",
]
