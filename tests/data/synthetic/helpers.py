"""What tests of generated volumes lend each other."""

from __future__ import annotations

import tarfile
from io import BytesIO

import numpy as np

SMALL = (16, 24, 20)


def write_ct(path, voxels, name="tmpx/matrix.dat"):
    with tarfile.open(path, "w") as file:
        for called, content in (("tmpx/main.plist", b"<plist/>"), (name, voxels)):
            member = tarfile.TarInfo(called)
            member.size = len(content)
            file.addfile(member, BytesIO(content))


def volumes(dataset, split="train"):
    return dataset.raw(np.arange(getattr(dataset, f"n_{split}")), split).astype(np.float32), dataset.labels(split)


def counts(x):
    """What needs no eye for shapes: mean, spread, maximum, percentiles and histogram of each volume."""
    x = x.reshape(len(x), -1)
    histogram = np.stack([np.histogram(volume, bins=24, range=(0, 1))[0] for volume in x]) / x.shape[1]
    percentiles = np.percentile(x, [5, 25, 50, 75, 95, 99], axis=1).T
    return np.hstack([x.mean(1)[:, None], x.std(1)[:, None], x.max(1)[:, None], percentiles, np.log(histogram + 1e-5)])


def accuracy_of_counts(data):
    """Of a logistic regression on `counts`, cross-validated over all volumes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = (np.concatenate(both) for both in zip(volumes(data), volumes(data, "test"), strict=True))
    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)), counts(x), y, cv=5).mean()
