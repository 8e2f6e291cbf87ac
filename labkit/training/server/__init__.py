"""The parameter server of one run: a process of its own, without torch and without Dask."""
