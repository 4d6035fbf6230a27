"""The room of evaluation: what is this encoder worth?"""

from barlow.evaluation.protocols import evaluate
from barlow.evaluation.result import Result, Row

__all__ = ["Result", "Row", "evaluate"]
