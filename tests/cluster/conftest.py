"""What tests of the cluster share: no lab outlives a test that asks for `closed`; a Dask cluster of somebody else."""

import logging

import pytest

from labkit.cluster import connect as connecting


@pytest.fixture
def closed():
    yield
    connecting.close_all()


@pytest.fixture
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        silence_logs=logging.CRITICAL,
    ) as made:
        yield made
