"""Evaluations: bits per byte, minimal pairs, recall, acceptance length of drafts, and the floor of n-grams."""

from explore.evals.acceptance import acceptance_length
from explore.evals.bits_per_byte import Score, bits_per_byte, score_batch
from explore.evals.documents import DocumentScores, score_documents
from explore.evals.minimal_pairs import MinimalPair, minimal_pair_accuracy, read_minimal_pairs
from explore.evals.ngram import NgramModel, ngram_scores
from explore.evals.recall import RecallScore, recall_accuracy, recall_score, score_recall

__all__ = [
    "DocumentScores",
    "MinimalPair",
    "NgramModel",
    "RecallScore",
    "Score",
    "acceptance_length",
    "bits_per_byte",
    "minimal_pair_accuracy",
    "ngram_scores",
    "read_minimal_pairs",
    "recall_accuracy",
    "recall_score",
    "score_batch",
    "score_documents",
    "score_recall",
]
