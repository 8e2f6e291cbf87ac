"""What is trained: `Problem`, the interface that a worker drives, and those that most people want: `Classifier`, `Regressor`."""

from labkit.models import evaluating
from labkit.names import face
from labkit.problems.classifier import Classifier
from labkit.problems.problem import Clock, Problem
from labkit.problems.regressor import Regressor

__all__ = ["Classifier", "Clock", "Problem", "Regressor", "evaluating"]
__getattr__, __dir__ = face(__name__)
