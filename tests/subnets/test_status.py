"""Progress of subnets: what workers report, what is shown of it, and workers that stop when no kernel waits for them."""

from __future__ import annotations

import re

import pytest

from labkit.errors import ClusterError, RunError
from labkit.plots import progress
from labkit.subnets import status
from labkit.subnets import train as subnets
from tests.subnets.helpers import data, problem

pytestmark = pytest.mark.usefixtures("cache")


def test_the_last_whole_line_of_each_subnet_counts(tmp_path):
    with status.awaited(tmp_path, "a"):
        assert not status.stopped(tmp_path, "a") and status.stopped(tmp_path, "b")  # an earlier training of the same name
        for epoch in (1, 2):
            assert not status.report(tmp_path, "a", 11, epoch, 0.5 / epoch, None)
        assert not status.report(str(tmp_path), "a", 2, 1, None, 0.75)
        assert status.report(tmp_path, "b", 2, 9, 0.0, None)
        with open(tmp_path / "subnet-11.jsonl", "a") as file:
            file.write('{"epoch": 3, "lo')
        assert list(status.latest(tmp_path).items()) == [
            (2, {"epoch": 1, "loss": None, "score": 0.75}),
            (11, {"epoch": 2, "loss": 0.25, "score": None}),
        ]
        assert not status.report(tmp_path, "a", 2, 1, 1.0, None) and status.latest(tmp_path)[2]["score"] is None  # trained again
    assert status.stopped(tmp_path, "a") and status.report(tmp_path, "a", 2, 2, 0.5, None) and not [*tmp_path.glob("awaited-*")]


def test_progress_is_a_line_for_each(train, capsys):
    train(progress=True, grid=(1, 3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("subnet ")]
    assert [line.split(":")[0] for line in lines] == [f"subnet {i} of 3" for i in (1, 2, 3)]
    assert all(" score " in line and " s on worker " in line for line in lines)


@pytest.mark.parametrize(
    "way", [{"patience": 30}, {"batched": 2}, pytest.param({"team": {"n_workers": 1}}, marks=pytest.mark.slow)]
)
def test_long_subnets_report_their_epochs_now_and_then(way, train, capsys, monkeypatch):
    monkeypatch.setattr(progress, "BAR_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    joined = train(problem(data=data(300)), (1, 2), progress=True, epochs=30, **way)
    if "team" in way:
        assert set(joined.parts().worker) == {"0", "1"}  # disjoint blocks, at the same time
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  part ")]
    loss = r"(, loss \d+\.\d{3})?" if "team" in way else r", loss \d+\.\d{3}"  # a worker that has just begun has none yet
    score = r", held-out score [01]\.\d{3}" if "patience" in way else ""
    seen = 0
    for part in (0, 1):
        matches = [re.fullmatch(rf"  part {part}: epoch (\d+) of 30{loss}{score}.*", line) for line in lines]
        epochs = [int(match[1]) for match in matches if match]
        assert epochs == sorted(set(epochs)) and set(epochs) <= set(range(1, 31))
        assert epochs or "team" in way  # a team of one is asked from outside, and may be done between two questions
        seen += len(epochs)
        assert len(epochs) == sum(f"part {part}:" in line for line in lines), [x for x in lines if "loss" not in x]
    assert seen


@pytest.mark.slow
def test_in_a_notebook_a_bar_shows_how_far_the_subnets_are(train, capsys, monkeypatch):
    shown = []
    monkeypatch.setenv("LABKIT_PLOTS", "interactive")
    monkeypatch.setattr("IPython.display.display", lambda what, **how: shown.append(what))
    train(progress=True)
    bar, text = shown[0].children
    assert (bar.value, text.value, shown[1:]) == (1.0, "4 of 4 subnets", [{"text/plain": "4 of 4 subnets"}])
    shown.clear()
    with pytest.raises(ClusterError, match="tasks were not done within 6 s"):
        train(grid=(1, 2), progress=True, epochs=100_000, timeout=6, batched=2)
    bar, text = shown[0].children
    assert 0 < bar.value < 0.9
    assert re.fullmatch(r"0 of 2 subnets(; part \d: epoch \d+ of 100000, loss \d\.\d{3}){2}", text.value)


@pytest.mark.parametrize("batched", [1, 2])
def test_workers_do_not_go_on_with_what_nobody_waits_for(batched, train, lab):
    """Nor when it is begun again at once: the folder of the new training is not that of the old one."""
    with pytest.raises(ClusterError, match="tasks were not done within 1 s; they were cancelled"):
        train(grid=(1, 2), epochs=1_000_000, timeout=1, batched=batched)
    again = train(grid=(1, 2), batched=batched, timeout=100)
    assert (again.parts().epochs == 3).all() and lab.map(abs, [-1, -2], timeout=100) == [1, 2]


def test_a_folder_that_another_training_has_replaced_is_not_written_to(train, lab, tmp_path, monkeypatch):
    def replacing(*given, **options):
        (tmp_path / "joined").rename(tmp_path / "other")
        (tmp_path / "joined" / "parts" / "checkpoints").mkdir(parents=True)
        return report(*given, **options)

    report = subnets.report
    monkeypatch.setattr(subnets, "report", replacing)
    with pytest.raises(RunError, match=r"replaced by another training of the same name\. Give each its own: name="):
        train(grid=(1, 1))
    assert not list((tmp_path / "joined" / "parts" / "checkpoints").iterdir()) and lab.free() == [0, 1]
