"""The inner layer: one training step of one worker as tasks that its threads share (BPT-CNN, Chen et al. 2019)."""
