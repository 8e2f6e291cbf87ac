"""What is trained: `Problem`, the interface that a worker drives, and `Classifier`, the one that most people want."""

from labkit.models import evaluating
from labkit.problems.classifier import Classifier
from labkit.problems.problem import Clock, Problem

__all__ = ["Classifier", "Clock", "Problem", "evaluating"]
