"""The worker of one run: what it trains, on which samples, and how it exchanges weights."""
