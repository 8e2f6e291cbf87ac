"""The same course without a cluster: exact and counterfactual replay, and simulation on a virtual clock."""
