"""Evaluation: protocols that measure an encoder, and their results."""

from barlow.evaluation.protocols import evaluate
from barlow.evaluation.result import Result, Row

__all__ = ["Result", "Row", "evaluate"]
