"""Many runs: notebooks over a grid of parameters, and the demo."""
