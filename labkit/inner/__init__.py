"""The inner layer: one training step of one worker as tasks that its threads share (BPT-CNN, Chen et al. 2019)."""

from labkit.inner.profiling import profile
from labkit.names import face

__all__ = ["profile"]
__getattr__, __dir__ = face(__name__)
