"""Generated volumes: made here, the same for the same seed, and declared as synthetic."""
