"""Trained subnets with their coarse network: tables, predictions, and the way to disk and back.

    <folder>/config.json                   settings, the shape and the scale of the data, the rows of both tables
    <folder>/checkpoints/00000000.npz      one flat vector: the weights of all subnets, then those of the coarse network
    <folder>/checkpoints/00000001.npz      those of the first baseline, and so on
    <folder>/parts/checkpoints/            only where they were trained: each subnet by its number, and its logits
    <folder>/baselines/, channel-groups/   the same for baselines, and for what the baseline "width" was composed of

Nothing is pickled: a file is whole, or refused by name (`labkit.runs.checkpoints`).

Made by `labkit.subnets.train`, baselines by `labkit.subnets.baselines`; read back with `labkit.load_subnets`.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from labkit.cards import Card, Carded
from labkit.data import open_dataset
from labkit.data.dataset import Field
from labkit.data.given import arranged
from labkit.errors import DataError, ProblemError, RunError, file_path, known
from labkit.imports import by_value
from labkit.models import describe, make_model
from labkit.models.flat import Flat
from labkit.models.normalised import Normalise, Normalised
from labkit.names import Public
from labkit.problems import Classifier, evaluating
from labkit.problems.trial import separate
from labkit.runs import checkpoints
from labkit.runs.config import FORMAT
from labkit.runs.files import read_json, write_json
from labkit.sources import changed
from labkit.subnets.coarse import VOTES, Joined, coarse_net, subnet_outputs
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import make_subnet, narrowed, subnet_seed
from labkit.training.local import BATCH

KEYS = ("problem", "decomposition", "shape", "n_classes", "centre", "rate", "parts", "n_workers", "bytes_to_coarse")
RENAMED = {"rivals": "baselines"}  # keys of config.json, by their names before format 3
ADDED = {"drift": 0.0, "stalls": None}  # keys that the first records did not have
NAMES = {"coarse": "CNN-DNN", "average": "average probability", "majority": "majority vote"}
BASELINES = {
    "global": "global CNN",
    "long": "global CNN, twice the epochs",
    "small": "small global CNN",
    "coherent": "coherent, from random weights",
    "transfer": "transfer, from the parts",
    "width": "width decomposition (Gu et al.)",
}


class Subnets(Carded, Public):
    """Trained subnets and their coarse network.

    Attributes
    ----------
    config : the settings, as in `config.json`
    decomposition : the `Decomposition`
    module : all of it as one torch module, from normalised samples to logits; `model()` takes raw ones
    baselines : what was trained besides: {"transfer": module, ...}, modules of the same kind
    rows, part_rows : what `table()` and `parts()` show
    """

    def __init__(self, module: Joined, config: dict[str, Any], rows: list[dict], part_rows: list[dict]) -> None:
        self.module, self.config, self.rows, self.part_rows = module, config, rows, part_rows
        self.baselines: dict[str, nn.Module] = {}
        self.decomposition = Decomposition.of(config["decomposition"])

    def __repr__(self) -> str:
        return f"<Subnets: {self.decomposition!r} of {tuple(self.config['shape'])}, accuracy {self.rows[0]['accuracy']:.3f}>"

    def _card(self) -> Card:
        grid = " x ".join(map(str, self.decomposition.grid))
        rows = {"decomposition": repr(self.decomposition), "samples": f"of shape {tuple(self.config['shape'])}"}
        table = [
            {name: row[name] for name in ("model", "accuracy", "parameters", "epochs", "seconds") if name in row}
            for row in self.rows
        ]
        calls = {
            "joined.predict(images)": "classes of raw images",
            "joined.table()": "all models",
            "joined.parts()": "all subdomains",
        }
        return Card(f"Subnets: {grid}, test accuracy {self.rows[0]['accuracy']:.3f}", rows=rows, table=table, calls=calls)

    def predict(self, images: np.ndarray, by: str = "coarse") -> np.ndarray:
        """Classes, int64 (n,), of images as they were given for the training, in their own units: arrays or tensors (n, C, H, W) or
        (n, C, D, H, W), channels first or last; a single channel may be left out.

        `by` is "coarse", "average" (mean probability), "majority" (equal votes: the larger summed probability), or a baseline that
        was trained: "transfer", for one.
        """
        return self.scores(images, by).argmax(1)

    def scores(self, images: np.ndarray, by: str = "coarse") -> np.ndarray:
        """What each class gets (n, K): probability, or share of the votes, where a trace of probability decides between equals."""
        by = known(
            "by", by, [*VOTES, *self.baselines], " A baseline has to be trained: train_subnets(..., baselines=['transfer'])."
        )
        images, normalise = self._arranged(images), self._normalise()
        found = [np.empty((0, self.config["n_classes"]), np.float32)]
        with evaluating(self.baselines.get(by, self.module)) as module:
            for at in range(0, len(images), BATCH):
                with torch.no_grad():
                    samples = normalise(torch.from_numpy(np.ascontiguousarray(images[at : at + BATCH])))
                    decided = module(samples).softmax(-1) if by in self.baselines else module.decide(*module.outputs(samples), by)
                found.append(decided.numpy())
        return np.concatenate(found)

    def predict_proba(self, images: np.ndarray, by: str = "coarse") -> np.ndarray:
        """The probability of each class, float32 (n, K), as `Run.predict_proba`: `scores` by another name."""
        return self.scores(images, by)

    def evaluate(self, data: Any, by: str = "coarse") -> dict[str, float]:
        """Score on raw samples with their labels: {"score": the share of right classes, "samples": n}.

        `data` is (x, y), x as in `predict`, y with the numbers that classes had in the training; or a name, a path or a `Dataset`: its
        test split.
        """
        if isinstance(data, tuple | list):
            images, labels = data
        else:
            dataset = open_dataset(data)
            every = np.arange(dataset.n_test)
            images, labels = dataset.raw(every, "test"), dataset.labels("test")
        labels = np.asarray(labels)
        found = self.predict(images, by)
        if labels.shape != found.shape:
            raise ProblemError(f"y has shape {labels.shape} for {len(found)} samples. Give one label for each sample.")
        return {"score": float((found == labels).mean()), "samples": len(found)}

    def model(self, by: str = "coarse") -> nn.Module:
        """One torch module from raw images (n, *shape), channels first, to logits (n, K): subnets and coarse network, or a baseline
        that was trained. Its first layer normalises; `.network` is what takes normalised ones."""
        known("by", by, ["coarse", *self.baselines], " Votes are no network: joined.predict(images, by='average').")
        return Normalised(self.baselines.get(by, self.module), [self._normalise()], [self.config["shape"]]).eval()

    def _normalise(self) -> Normalise:
        return Normalise(self.config["centre"], self.config["rate"], len(self.config["shape"]))

    def _arranged(self, images: Any) -> np.ndarray:
        field = Field(tuple(self.config["shape"]), np.dtype(np.float32), "input")
        try:
            affine = np.asarray(self.config["centre"]), np.asarray(self.config["rate"])
            return arranged(images, field, affine, np.dtype(np.uint8), "images", self.config.get("channels_last", False))
        except DataError as error:
            raise ProblemError(f"these subnets cannot be given that: {error}") from error

    def table(self) -> pd.DataFrame:
        """A row a model: test accuracy, parameters, multiply-adds a sample, epochs, seconds and wall_s.

        `seconds` goes by the rule of the paper: the longest of the subnets plus the coarse network, as if there were a worker
        (a block, or one for each batch) for each, and for each copy of "out-of-fold"; `wall_s` is what passed on this lab. What is
        trained in two stages has the epochs and the time of both.
        """
        return pd.DataFrame(self.rows).set_index("model")

    def parts(self) -> pd.DataFrame:
        """A row a subdomain: its place in the grid, test accuracy of its subnet alone, score, epochs trained and the best of them
        (whose weights it has), seconds (of its whole batch, where `batched` were trained at once), worker or workers, cost."""
        return pd.DataFrame(self.part_rows).set_index("part")

    def summary(self) -> dict[str, Any]:
        """Accuracy and times of the joined subnets, and what was sent: `t_par` by the rule of the paper, `busy` the share of the
        wall time of the subnets that the workers trained, `speedup` T(global) / T_par where the global network is in the table."""
        rows = {row["model"]: row for row in self.rows}
        own, there = rows[NAMES["coarse"]], rows.get("global CNN")
        seconds = [row["seconds"] / row["batched"] + row["folds_s"] for row in self.part_rows]
        block = (self.config["team"] or {"n_workers": 1})["n_workers"]
        return {
            "n_parts": self.decomposition.n_parts,
            "n_workers": self.config["n_workers"],
            "accuracy": own["accuracy"],
            "t_par": own["seconds"],
            "wall_s": own["wall_s"],
            "busy": block * sum(seconds) / (self.config["n_workers"] * rows[NAMES["average"]]["wall_s"]),
            "speedup": there["seconds"] / own["seconds"] if there else None,
            "bytes_between_subnets": 0,
            "bytes_to_coarse": self.config["bytes_to_coarse"],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all of it to a folder, whole or not at all; what another model left there is not touched: RunError."""
        path = file_path("path", path).absolute()
        if (path / "config.json").exists() and read_json(path / "config.json").get("what") != "subnets":
            raise RunError(f"{path} holds something else than subnets. Save to a new folder.")
        try:
            (path / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
            fresh = {"id": secrets.token_hex(8), "rows": self.rows, "parts": self.part_rows}  # a mix of two saves is refused
            settings = self.config | fresh | {"format": FORMAT, "baselines": list(self.baselines)}
            write_json(path / "config.json", settings, run=fresh["id"])
            for number, module in enumerate([self.module, *self.baselines.values()]):
                checkpoints.write(path, number, Flat(module).vector.numpy())
        except OSError as error:
            raise RunError(f"the subnets cannot be saved in {path}: {error}.") from error
        return path


def describe_problem(problem: Classifier) -> dict[str, Any]:
    """What the record of subnets holds of the problem: enough to use them without its data."""
    dataset = problem.dataset
    centre, rate = (numbers.tolist() for numbers in dataset.affine)
    return {
        "format": FORMAT,
        "what": "subnets",
        "problem": problem.config(),
        "shape": list(dataset.shape),
        "n_classes": dataset.n_classes,
        "centre": centre,
        "rate": rate,
        "channels_last": dataset.is_channels_last(dataset.inputs[0]),
        "synthetic": dataset.synthetic,
        "data_note": dataset.note,
    }


def load_subnets(path: str | os.PathLike[str], model: Callable[..., nn.Module] | None = None) -> Subnets:
    """Subnets as they were saved, or as `train_subnets` left them; the data set is not needed.

    A model that was written in a notebook is not in the file: give its function as `model`.

    Examples
    --------
    >>> alone = labkit.load_subnets(joined.save("joined"))
    >>> alone.predict(np.zeros((3, 1, 8, 8), np.uint8)).shape
    (3,)
    """
    path = file_path("path", path).absolute()
    config = read_json(path / "config.json")
    config = ADDED | {RENAMED.get(key, key): value for key, value in config.items()}
    if config.get("what") != "subnets":
        raise RunError(f"{path} does not hold subnets. A run of labkit.train is read by labkit.load_run.")
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise RunError(f"{path} was written by a later labkit (format {config.get('format')}). Update labkit to read it.")
    if "rows" not in config:
        raise RunError(f"{path} holds no trained subnets: their training did not end. Train them again.")
    if lacking := [key for key in KEYS if key not in config]:
        raise RunError(f"{path / 'config.json'} lacks {', '.join(lacking)}: it is damaged, or of another labkit. Train them again.")
    settings = config["problem"]
    if model is None and (lost := by_value([settings["model"], settings["model_args"]])) is not None:
        raise RunError(f"{path}: the model {lost!r} was written in a notebook. Give its function: load_subnets(..., model=...).")
    for file in changed(config.get("sources", {})):
        warnings.warn(f"{file} is not what the subnets in {path} were trained with; what they predict may differ.", stacklevel=2)
    network = model or settings["model"], settings["model_args"]
    try:
        joined = Subnets(make_joined(config, *network), config, config["rows"], config["parts"])
        joined.baselines = {name: make_baseline(name, config, *network) for name in config.get("baselines", [])}
    except (KeyError, TypeError, ValueError, ProblemError) as error:
        raise RunError(f"{path / 'config.json'} does not describe subnets that can be made here: {error}") from error
    for number, module in enumerate([joined.module, *joined.baselines.values()]):
        fill(module, path, number)
    return joined


def make_joined(config: Mapping[str, Any], model: Any, model_args: Mapping[str, Any]) -> Joined:
    """The graph of subnets and coarse network with random weights; those of part i derive from (seed, i)."""
    decomposition, shape, n_classes = Decomposition.of(config["decomposition"]), tuple(config["shape"]), config["n_classes"]

    def subnet(part: int) -> nn.Module:
        seed = subnet_seed(config["seed"], part)
        return make_subnet(model, model_args, decomposition, part, config["width_rule"], shape, n_classes, seed)

    windows = enumerate(decomposition.shapes(shape))
    subnets = [separate(partial(subnet, part), window, config["seed"], f"model {describe(model)}") for part, window in windows]
    inputs, size = config["inputs"], (decomposition.n_parts, n_classes)
    if inputs == "features":
        windows = zip(subnets, decomposition.shapes(shape), strict=True)
        size = (sum(output_size(net, window, inputs) - n_classes for net, window in windows),)
    arguments = {"hidden": config["hidden"], "dropout": config["dropout"], "scaled": inputs == "features"}
    coarse = make_model(coarse_net, size, n_classes, arguments, config["seed"])
    return Joined(decomposition.windows(shape), subnets, coarse, inputs)


def output_size(net: nn.Module, shape: Sequence[int], inputs: str) -> int:
    """How many outputs a subnet has for one sample of `shape`: see `subnet_outputs`."""
    with evaluating(net) as plain:
        return subnet_outputs(plain, torch.zeros(1, *shape), inputs).shape[1]


def make_baseline(name: str, config: Mapping[str, Any], model: Any, model_args: Mapping[str, Any]) -> nn.Module:
    """The network of a baseline with random weights."""
    if known("baselines", name, BASELINES) in ("coherent", "transfer"):
        return make_joined(config, model, model_args)
    if name == "small":
        model_args = narrowed(model_args, Decomposition.of(config["decomposition"]).n_parts, config["width_rule"])
    shape = tuple(config["shape"])
    make = partial(make_model, model, shape, config["n_classes"], model_args, config["seed"])
    return separate(make, shape, config["seed"], f"model {describe(model)}")


def fill(module: nn.Module, path: Path, version: int) -> dict[str, Any]:
    """Give a module the weights of a checkpoint; returns the state that was written with them."""
    weights, state = checkpoints.read_state(path, version)
    flat = Flat(module)
    if len(weights) == len(flat.vector) - flat.n_bytes:  # before buffers that are not float32 were stored
        flat = Flat(module, exact=False)
    if len(weights) != len(flat.vector):
        raise RunError(
            f"{path}, version {version}: {len(weights)} weights for a model of {len(flat.vector)}. It was changed since."
        )
    flat.load(torch.from_numpy(weights.copy()))
    return state
