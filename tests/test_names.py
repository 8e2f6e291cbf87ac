"""Names that labkit does not have: arguments as neighbouring libraries call them, objects of another kind, attributes that do not exist.

Used by pytest.
"""

from __future__ import annotations

import inspect
import shutil

import numpy as np
import pytest
from torch import nn

import labkit
from labkit import names, plots
from labkit.errors import ClusterError, RunError
from labkit.plots import style
from labkit.runs.record import directories
from tests.runs.test_old_records import FOLDER

pytestmark = pytest.mark.usefixtures("cache")
RUN = FOLDER / "format-2-agwu"
OWNERS = {"a problem, as labkit.Classifier": labkit.Classifier, "labkit.train": labkit.train}
OWNERS |= {"labkit.connect": labkit.connect, "labkit.search": labkit.search}


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", names.ARGUMENTS)
def test_what_is_said_of_an_argument_is_where_it_is_given(owner):
    assert set(names.ARGUMENTS[owner]) <= set(inspect.signature(OWNERS[owner]).parameters)


def test_each_word_of_a_neighbour_leads_to_an_argument_of_labkit():
    there = {name for own in names.ARGUMENTS.values() for name in own}
    assert set(names.NEIGHBOURS.values()) <= there and not set(names.NEIGHBOURS) & there


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: labkit.Classifier("lenet", "digits", optimizer="adam"), r"Classifier\(\) got an unexpected keyword argument 'optimizer'. In labkit it is optimiser=\."),
        (lambda: labkit.Classifier("lenet", "digits", batch=8), r"In labkit it is batch_size=\."),
        (lambda: labkit.Regressor("lenet", "digits", criterion="mse"), r"Regressor\(\) got an unexpected keyword argument 'criterion'. In labkit it is loss="),
        (lambda: labkit.Classifier("lenet", "digits", epochs=3), r"passes= is an argument of labkit\.train\."),
        (lambda: labkit.Classifier("lenet", "digits", val_data=3), r"data=\(x_train, y_train, x_test, y_test\)"),
        (lambda: labkit.Classifier("lenet", "digits", device="cuda"), r"gives worker i one of them"),
        (lambda: labkit.Classifier("lenet", "digits", momentun=0), r"'momentun'\. Did you mean 'momentum'\?$"),
        (lambda: labkit.Classifier("lenet", "digits", label="kind"), r"'label'\. What .* data=labkit\.open_dataset\(data, label=\.\.\.\)\.$"),
        (lambda: labkit.Regressor("lenet", "digits", target="t"), r"data=labkit\.open_dataset\(data, target=\.\.\.\)\.$"),
        (lambda: labkit.train(labkit.Classifier("lenet", "digits")), r"train\(\) needs a lab: lab = labkit\.connect\(n_workers=2\), and then train\(problem, lab\)\."),
        (lambda: labkit.search(labkit.Classifier("lenet", "digits"), {}), r"and then search\(problem, space, lab\)\."),
        (lambda: labkit.compare(RUN, RUN), r"Give several runs as a list: compare\(\[a, b\]\)\."),
        (lambda: plots.curves(labkit.load_run(RUN), labkit.load_run(RUN)), r"Give several runs as a list: curves\(\[a, b\]\)\."),
        (lambda: labkit.train(None, None, epochs=3), r"train\(\) got an unexpected keyword argument 'epochs'. In labkit it is passes=\."),
        (lambda: labkit.train(None, None, callbacks=[]), r"In labkit it is on_version=\."),
        (lambda: labkit.train(None, None, loss="mse"), r"loss= is an argument of a problem, as labkit\.Classifier\."),
        (lambda: labkit.train(None, None, optimizer="sgd"), r"optimiser= is an argument of a problem"),
        (lambda: labkit.train(None, None, batch_size=3), r"batch_size= is an argument of a problem"),
        (lambda: labkit.train(None, None, slowdown=[1, 4]), r"slowdown= is an argument of labkit\.connect\."),
        (lambda: labkit.search(None, {}, None, n_trials=3), r"In labkit it is trials=\."),
        (lambda: labkit.resume("runs/x", epochs=3), r"resume\(\) got an unexpected keyword argument 'epochs'. passes= is an argument of labkit\.train"),
        (lambda: labkit.connect("threads", num_workers=3), r"connect\(\) has no argument 'num_workers'; what a job asks for .* In labkit it is n_workers=\."),
        (lambda: labkit.connect("threads", slowdwn=[1]), r"kind='slurm'\. Did you mean 'slowdown'\?"),
        (lambda: labkit.train(None, None, zzz=3), r"It has: problem, lab, partition, .*on_version\."),
        (lambda: labkit.showers.ShowerGAN(optimizer="adam"), r"^ShowerGAN\(\) got an unexpected .* In labkit it is optimiser=\."),
        (lambda: labkit.showers.ShowerGAN(batch_sise=2), r"Did you mean 'batch_size'\?$"),
        (lambda: labkit.showers.ShowerGAN(score_sample=2), r"Did you mean 'score_samples'\?$"),
        (lambda: labkit.jets.UCluster("jets", epochs=3), r"UCluster\(\) got an unexpected keyword argument 'epochs'. passes= is"),
    ],
)  # fmt: skip
def test_an_argument_that_another_library_has_is_led_to_the_one_here(call, says):
    with pytest.raises(TypeError, match=says):
        call()


def test_a_problem_of_the_users_own_is_named_by_its_class():
    class Mine(labkit.Classifier):
        def __init__(self, **options):
            super().__init__("lenet", "digits", **options)

    with pytest.raises(TypeError, match=r"^Mine\(\) got an unexpected keyword argument 'optimizer'. In labkit it is optimiser=\.$"):
        Mine(optimizer="adam")


# -- objects of another kind -------------------------------------------------------------------------------------------


def test_what_is_no_run_is_led_to_one(tmp_path):
    run = labkit.load_run(RUN)
    for draw in (plots.confusion, plots.worst):  # need more than the record
        with pytest.raises(TypeError, match=rf"run='{RUN}' must be a run, .* give it: labkit.load_run\('{RUN}'\)"):
            draw(RUN)
    with pytest.raises(RunError, match=rf"{tmp_path / 'config.json'} is missing: is {tmp_path} a run directory"):
        plots.curves(tmp_path)
    with pytest.raises(RunError, match=r"is a folder of \d+ runs, and this is of one: .*format-2-agwu"):
        plots.timeline(FOLDER)
    with pytest.raises(TypeError, match=r"runs=5 must be a run, as labkit.train and labkit.load_run give it, not int"):
        plots.curves(5)
    with pytest.raises(
        TypeError, match=r"a Run was given; give a pandas DataFrame .*samples_per_s.* Of a run there are plots.timeline"
    ):
        plots.speed(run)
    assert len(labkit.compare([RUN])) == len(labkit.compare(str(RUN))) == 1
    with pytest.raises(RunError, match=r"is no run but a folder of \d+: .*format-2-agwu.*labkit.load_run\(.*labkit.compare\("):
        labkit.load_run(FOLDER)


def test_a_path_means_its_run_or_the_runs_in_it(tmp_path):
    shutil.copytree(RUN, tmp_path / "runs" / "one"), shutil.copytree(RUN, tmp_path / "runs" / "two")
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "config.json").write_text("{")
    runs = [labkit.load_run(tmp_path / "runs" / name) for name in ("one", "two")]
    for given in (tmp_path / "runs", str(tmp_path / "runs"), [runs[0], tmp_path / "runs" / "two"]):
        assert [str(run.path) for run in style.some_runs(given)] == [str(run.path) for run in runs]
    assert len(labkit.compare(tmp_path / "runs")) == 3 and len(labkit.compare([RUN, tmp_path / "runs"])) == 4
    for draw in (plots.staleness, plots.timeline):
        assert str(draw(str(RUN)).opts) and repr(draw(RUN)) == repr(draw(labkit.load_run(RUN)))


def test_a_folder_means_all_runs_below_it_but_not_what_lies_in_a_run(tmp_path):
    """Plain runs beside a sweep, one of whose rows holds a search."""
    names = ["plain", "sweep/0-a/run", "sweep/0-a/search/trials/00"]
    for name in (*names, "plain/old", ".hidden/run"):
        shutil.copytree(RUN, tmp_path / name)
    assert [str(run.path.relative_to(tmp_path)) for run in style.some_runs(tmp_path)] == names
    assert len(labkit.compare(tmp_path)) == 3


def test_a_run_to_which_links_lead_counts_once_and_a_link_that_leads_nowhere_hides_none(tmp_path):
    names, far = ["one", "sweep/0-a/run"], tmp_path / "far"
    for name in names:
        shutil.copytree(RUN, tmp_path / "runs" / name)
    shutil.copytree(RUN, far / "run")
    links = {"up": "..", "same": "sweep", "self": "self", "gone": "nowhere", "scratch": far, "sweep/back": "../../runs", "z": "one"}
    for name, to in links.items():
        (tmp_path / "runs" / name).symlink_to(to)
    assert [path.relative_to(tmp_path / "runs").as_posix() for path in directories(tmp_path / "runs")] == [
        "one", "scratch/run", "same/0-a/run",
    ]  # fmt: skip


def test_what_is_no_client_is_led_to_one():
    ipyparallel = pytest.importorskip("ipyparallel")
    with pytest.raises(
        ClusterError, match=r"client=Cluster is a class.*client=ipyparallel.Cluster\(n=2\).start_and_connect_sync\(\)"
    ):
        labkit.connect(client=ipyparallel.Cluster)
    with pytest.raises(
        ClusterError, match=r"client=cluster.connect_client_sync\(\), or, before it is started, cluster.start_and_connect"
    ):
        labkit.connect(client=ipyparallel.Cluster())
    distributed = pytest.importorskip("distributed")
    for cls in (distributed.Client, distributed.LocalCluster):
        with pytest.raises(
            ClusterError, match=rf"client={cls.__name__} is a class.*labkit.connect\(client={cls.__name__}\(...\)\)"
        ):
            labkit.connect(client=cls)
    with pytest.raises(ClusterError, match=r"client=5 must be a Dask Client or cluster object, not int.*n_workers=2"):
        labkit.connect(client=5)


def test_a_problem_of_another_run_is_refused():
    width = {"width": 0.08}
    assert labkit.load_run(RUN, problem=labkit.Classifier("lenet", "digits", model_args=width, lr=0.5)).model()
    other = labkit.load_run(RUN, problem=labkit.Classifier(lambda: nn.Linear(3, 4), "digits"))
    says = r"other tensors than that of run done. It was trained with model='lenet', model_args={'width': 0.08}, data='digits'; without problem="
    for ask in (other.model, other.evaluate, lambda: other.predict(np.zeros((2, 8, 8)))):
        with pytest.raises(RunError, match=says):
            ask()
    x = np.random.default_rng(0).random((60, 1, 8, 8))
    other = labkit.load_run(RUN, problem=labkit.Classifier("lenet", (x, np.arange(60) % 10), model_args=width))
    with pytest.raises(
        RunError, match=r"have \d+ training samples, and run done had 200: .* Other data are for run.evaluate\(data\)"
    ):
        other.model()


# -- attributes --------------------------------------------------------------------------------------------------------

MODULES = {  # of those whose names are not all in the docstring: some that are there, and some that a user is not to be offered
    "chaos": ({"kill", "Storm", "audit"}, {"np", "psutil", "RunError", "annotations"}),
    "data": ({"open_dataset", "names", "Dataset"}, {"inspect", "cache", "did_you_mean", "OPTIONS"}),
    "inner": ({"profile"}, {"engine", "executor"}),
    "jets": ({"generate", "UCluster", "table"}, {"pythia", "networks", "problem"}),
    "models": ({"lenet", "resnet20", "seeded"}, {"torch", "np", "ProblemError", "contextlib"}),
    "plots": ({"curves", "save", "timeline"}, {"style", "runs", "samples", "steps"}),
    "problems": ({"Classifier", "Problem", "Clock"}, {"losses", "trial"}),
    "showers": ({"ShowerGAN", "validate"}, {"gan", "features", "files"}),
    "updates": ({"AGWU", "names", "make_update", "Push"}, {"base", "make_rule", "elastic"}),
}


def test_each_public_module_is_asked():
    assert {name for name in dir(labkit) if inspect.ismodule(getattr(labkit, name))} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_completion_of_a_module_offers_what_is_public(name):
    module, (there, hidden) = getattr(labkit, name), MODULES[name]
    assert dir(module) == sorted(module.__all__) and there <= set(dir(module)) and not hidden & set(dir(module))
    assert all(hasattr(module, public) for public in dir(module))
    for public in dir(module):
        assert (
            inspect.ismodule(getattr(module, public))
            or not inspect.isroutine(getattr(module, public))
            or getattr(module, public).__doc__
        )


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: labkit.trian, r"^module 'labkit' has no attribute 'trian'\. Did you mean 'train'\?$"),
        (lambda: labkit.zzz, r"^module 'labkit' has no attribute 'zzz'\. It has: AGWU, .*, updates, watch\.$"),
        (lambda: plots.curve, r"^module 'labkit.plots' has no attribute 'curve'\. Did you mean 'curves'\?$"),
        (lambda: labkit.updates.AGUW, r"^module 'labkit.updates' has no attribute 'AGUW'\. Did you mean 'AGWU'\?$"),
        (lambda: labkit.data.open_datset, r"Did you mean 'open_dataset'\?$"),
        (lambda: labkit.models.lenett, r"Did you mean 'lenet'\?$"),
        (lambda: labkit.problems.Clasifier, r"Did you mean 'Classifier'\?$"),
        (lambda: labkit.load_run(RUN).modle, r"^'Run' object has no attribute 'modle'\. Did you mean 'model'\?$"),
        (lambda: labkit.load_run(RUN).sumary(), r"Did you mean 'summary'\?$"),
        (lambda: labkit.load_run(RUN).plott, r"^'Run' object has no attribute 'plott'\. It has: .*weights\.$"),
        (lambda: labkit.open_dataset("digits").n_clases, r"^'Dataset' object has no attribute 'n_clases'\. Did you mean 'n_classes'\?$"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_is_answered_with_the_one_that_was_meant(ask, says):
    with pytest.raises(AttributeError, match=says):
        ask()


def public(thing):
    return {name for name in dir(thing) if not name.startswith("_")}


def test_completion_of_a_run_and_a_lab_offers_what_is_public(tmp_path):
    run = labkit.load_run(RUN)
    assert public(run) == {
        "allocations", "attach", "balance", "checkpoint", "config", "contributions", "curve", "evaluate", "events", "export", "flat", "inspect", "kill", "label", "live",
        "membership", "model", "name", "origin", "path", "predict", "predict_proba", "predictions", "problem", "progress", "save", "slow_down", "staleness",
        "state", "status", "stop", "summary", "test_score", "time_to", "timeline", "wait", "weights",
    }  # fmt: skip
    with labkit.connect("threads", 1) as lab:
        assert public(lab) == {
            "add", "client", "close", "closed", "dashboard", "drift", "emulated", "free", "jitter", "kind", "lost", "map", "runs", "stalls", "start",
            "table", "workers",
        }  # fmt: skip
        with pytest.raises(AttributeError, match="Did you mean 'workers'"):
            lab.worker  # noqa: B018
    assert {"batch", "classes", "fields", "labels", "n_train", "raw", "shape"} <= public(labkit.open_dataset("digits"))
    assert not {"hold", "expect", "described", "stored_type"} & public(labkit.open_dataset("digits"))


def test_what_a_property_raises_is_not_hidden(monkeypatch):
    monkeypatch.setattr(type(labkit.load_run(RUN)), "label", property(lambda run: run.config.nothing))
    with pytest.raises(AttributeError, match="'RunConfig' object has no attribute 'nothing'"):
        labkit.load_run(RUN).label  # noqa: B018
