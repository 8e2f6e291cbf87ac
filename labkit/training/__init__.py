"""Training on a lab: `train`, `resume`, the parameter server, the workers, and what goes between them."""
