"""Where a run trains: `connect()`, the lab, its back ends (Dask, ipyparallel, SLURM), and emulated heterogeneity."""
