"""What is trained: `Problem`, the interface that a worker drives, and `Classifier`, the one most people want."""

from labkit.problems.problem import Classifier, Clock, Problem, evaluating

__all__ = ["Classifier", "Clock", "Problem", "evaluating"]
