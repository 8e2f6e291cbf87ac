"""Domain decomposition: subnets that train without communication, the coarse network over them, and the baselines."""
