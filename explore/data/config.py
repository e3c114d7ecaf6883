"""Configs of training data: text, or synthetic recall."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from explore.config import Config, added_later
from explore.data.batches import Source, TextSource
from explore.data.corpora import Corpus, load_corpus
from explore.data.recall import RecallSource
from explore.data.splits import SPLITS
from explore.data.tokenizer import load_tokenizer
from explore.data.tokens import token_streams
from explore.foreign import echo


class TextData(Config):
    """Windows of a corpus.

    Attributes:
        corpus: a name in `CORPORA`, a file or folder of .txt or .jsonl, or `hf:` and the name or folder of a data set.
        tokenizer: a name in `TOKENIZERS`, or a JSON file of the `tokenizers` package.
        seq_len: tokens per window.
        n_shards: use only the first training files, in name order.
    """

    kind: Literal["text"] = "text"
    corpus: str = "austen"
    tokenizer: str = "austen-bpe-2048"
    seq_len: PositiveInt = 256
    n_shards: PositiveInt | None = None

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that determines the batches, by content, without names or paths.

        Raises:
            ValueError: no such corpus or tokenizer.
        """
        corpus = self._load_corpus()
        return {
            "kind": self.kind,
            "seq_len": self.seq_len,
            **{split: corpus.content_hash(split) for split in SPLITS},
            "tokenizer": load_tokenizer(self.tokenizer).content_hash,
        }

    def open(self, seed: int) -> Source:
        """Reads, tokenizes and caches the text.

        Raises:
            ValueError: no such corpus or tokenizer, or a split shorter than one window.
        """
        corpus, tokenizer = self._load_corpus(), load_tokenizer(self.tokenizer)
        streams = token_streams(corpus, tokenizer)
        for split, stream in streams.items():
            if stream.n_tokens <= self.seq_len:
                raise ValueError(
                    f"seq_len must be below {stream.n_tokens}, the number of tokens in {split} of {echo(self.corpus)}, "
                    f"got {self.seq_len}"
                )
        return TextSource(streams, tokenizer, self.seq_len, seed, corpus.notes)

    def _load_corpus(self) -> Corpus:
        return load_corpus(self.corpus, self.n_shards)


class RecallData(Config):
    """Multi-query associative recall; `RecallSource` draws an example.

    Attributes:
        n_pairs: key-value pairs per sequence.
        n_queries: number of pairs that are queried; None queries all.
        vocab_size: number of token ids; 0 is the filler, keys are in the lower half, values in the upper half.
        power_a: exponent of the query positions; 1 spreads queries evenly, smaller values move them closer to the
            pairs.
        n_eval: sequences in each of validation and test.
        fewer_pairs: further numbers of pairs, below `n_pairs`; sequences alternate between these and `n_pairs`, and
            recall is also measured by number of pairs.
    """

    kind: Literal["recall"] = "recall"
    seq_len: PositiveInt = 64
    n_pairs: PositiveInt = 8
    n_queries: PositiveInt = Field(default_factory=lambda data: data["n_pairs"])
    vocab_size: PositiveInt = 256
    power_a: float = Field(default=0.01, gt=0, le=1)
    n_eval: int = Field(default=512, gt=0, le=1_000_000)
    fewer_pairs: tuple[PositiveInt, ...] = added_later(())

    @model_validator(mode="after")
    def _fits(self) -> RecallData:
        if self.n_queries > self.n_pairs:
            raise ValueError(f"n_queries: {self.n_queries} must be at most n_pairs, {self.n_pairs}")
        if self.fewer_pairs != tuple(sorted({n for n in self.fewer_pairs if n < self.n_pairs})):
            raise ValueError(
                f"fewer_pairs: must be in rising order and below n_pairs, {self.n_pairs}, got {[*self.fewer_pairs]}"
            )
        shortest = 2 * (self.n_pairs + self.n_queries)
        if self.seq_len < shortest:
            raise ValueError(
                f"seq_len: {self.seq_len} must be at least {shortest}, twice n_pairs ({self.n_pairs}) "
                f"and twice n_queries ({self.n_queries})"
            )
        smallest = 2 * (self.n_pairs + 1)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size: {self.vocab_size} must be at least {smallest}, "
                f"a filler and {self.n_pairs} different keys (n_pairs) in its first half"
            )
        return self

    def open(self, seed: int) -> Source:
        return RecallSource(**self.model_dump(exclude={"kind"}), seed=seed)


DataConfig = Annotated[TextData | RecallData, Field(discriminator="kind")]
