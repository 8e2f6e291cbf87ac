"""Training on a lab: `train`, `resume`, the parameter server, the workers, and the messages between them."""
