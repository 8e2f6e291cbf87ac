"""The run directory: settings, events, checkpoints; reading and analysing them."""
