"""Workers as SLURM jobs, on a real SLURM of one machine: they come, they go, and SLURM's own words say why they do not come."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import labkit
from labkit.cluster import slurm
from labkit.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "cluster" / "slurm" / "slurm.sh"
JOBS = {"memory": "500MB", "walltime": "00:10:00", "interface": "lo"}


def _needs_jobqueue():  # not importorskip: its import makes Ctrl-C end the process, which labkit.cluster.slurm mends
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("needs dask-jobqueue: pip install 'labkit[slurm]'")


def test_an_interrupt_stays_what_it_was(monkeypatch):
    _needs_jobqueue()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in [name for name in sys.modules if name.startswith("dask_jobqueue")]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGINT)
    slurm._slurm()
    assert signal.getsignal(signal.SIGINT) is before


def real(test):
    return pytest.mark.cluster(pytest.mark.slow(test))


@pytest.fixture(scope="module")
def cluster_of_jobs(tmp_path_factory):
    """A SLURM of two virtual nodes with 2 CPUs each; SLURM_CONF points to it."""
    missing = [
        name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name, path=f"{os.defpath}:/usr/sbin")
    ]
    if missing:
        pytest.skip(f"needs SLURM, and there is no {' and no '.join(missing)} here (Debian: slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("SLURM's daemons have to be started by root")
    _needs_jobqueue()
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        started = run(SCRIPT, "start", folder, 2)
        assert started.returncode == 0, started.stdout + started.stderr
        try:
            yield folder
        finally:
            stopped = run(SCRIPT, "stop", folder)
            assert stopped.returncode == 0, stopped.stdout + stopped.stderr


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL, **options
    )


def queue():
    """Jobs that have not ended."""
    return run("squeue", "--noheader", "--format=%i %T").stdout.split("\n")[:-1]


def until(condition, limit=30.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.1)


@real
def test_one_worker_a_job_from_the_first_task_to_the_end_of_the_job(cluster_of_jobs, tmp_path, capsys):
    from distributed import Client

    def about(dask_worker):  # travels by value: the jobs do not know this file
        names = ("SLURM_JOB_ID", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        profiled = "profile" in dask_worker.periodic_callbacks
        return {name: os.environ.get(name) for name in names} | {"ignores": ignored, "profiled": profiled}

    cluster = slurm.start_cluster(2, log_directory=tmp_path, threads=1, cores=2, gpus=1, timeout=90, **JOBS)
    try:
        said = capsys.readouterr().out
        assert said.count("#!/usr/bin/env bash") == 1 and "#SBATCH --cpus-per-task=2" in said and len(said.splitlines()) < 20
        with Client(cluster, set_as_default=False) as client:
            found = client.run(about)
            assert all(worker["nthreads"] == 1 for worker in client.scheduler_info(n_workers=-1)["workers"].values())
        assert len({worker["SLURM_JOB_ID"] for worker in found.values()}) == 2 == len(queue())
        for worker in found.values():
            assert worker["OMP_NUM_THREADS"] == "1" and worker["ignores"] and not worker["profiled"]
            assert worker["CUDA_VISIBLE_DEVICES"] == "0"  # the stand-in
    finally:
        cluster.close(timeout=20)
    until(lambda: not queue())


@real
def test_a_lab_trains_on_them(cluster_of_jobs, tmp_path, cache):
    problem = labkit.Classifier("lenet", "digits", train_samples=200, test_samples=50, batch_size=20)
    with labkit.connect(kind="slurm", n_workers=2, log_directory=tmp_path, timeout=90, **JOBS) as lab:
        assert len(queue()) == 2
        run = labkit.train(problem, lab, passes=1, runs=tmp_path / "runs").wait(timeout=100)
    assert run.state == "done" and set(run.events[run.events.kind == "push"].worker) == {0, 1}
    until(lambda: not queue())


@real
def test_beyond_loopback_it_is_tls(cluster_of_jobs, tmp_path):
    pytest.importorskip("cryptography", reason="needs cryptography: pip install 'labkit[slurm]'")
    from distributed import Client

    cluster = slurm.start_cluster(1, log_directory=tmp_path, timeout=90, **(JOBS | {"interface": None}))
    (folder,) = tmp_path.glob(".tls-*")
    assert folder.stat().st_mode & 0o077 == 0
    with cluster, Client(cluster, set_as_default=False) as client:
        addresses = [cluster.scheduler_address, *client.scheduler_info(n_workers=-1)["workers"]]
        assert all(address.startswith("tls://") for address in addresses)
        assert client.submit(abs, -3).result(timeout=30) == 3
    until(lambda: not queue())


@real
def test_a_job_that_waits_is_cancelled_with_the_reason_that_slurm_gives(cluster_of_jobs, tmp_path):
    with pytest.raises(ClusterError, match=r"0 of 1 workers arrived in 3 s; the jobs are cancelled.\n") as caught:
        slurm.start_cluster(1, job_extra=["--hold"], log_directory=tmp_path, timeout=3, **JOBS)
    assert re.search(r"job \d+: PENDING, reason: JobHeldUser\nNo job has written a log to ", str(caught.value))
    assert not queue()


@real
def test_a_kernel_that_is_killed_leaves_no_jobs(cluster_of_jobs, tmp_path):
    code = f"""if __name__ == "__main__":
    import os
    from labkit.cluster import slurm
    slurm.start_cluster(2, log_directory={str(tmp_path)!r}, timeout=90, **{JOBS!r})
    os.kill(os.getpid(), 9)
"""
    (tmp_path / "kernel.py").write_text(code)
    assert run(sys.executable, tmp_path / "kernel.py").returncode == -9
    until(lambda: not queue(), limit=60)


@real
def test_more_jobs_than_nodes(cluster_of_jobs, tmp_path):
    with pytest.raises(ClusterError, match=r"2 of 3 workers arrived in \d+ s") as caught:
        slurm.start_cluster(3, cores=2, log_directory=tmp_path, timeout=20, **JOBS)
    said = str(caught.value)
    assert len(re.findall(r"job \d+: RUNNING", said)) == 2 and re.search(r"job \d+: PENDING, reason: (Resources|Priority)", said)
    until(lambda: not queue())


@real
@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"queue": "none-such"}, "sbatch refused the job: .*invalid partition"),
        ({"memory": "900GB"}, "sbatch refused the job: .*Requested node configuration is not available|Memory specification"),
    ],
)
def test_what_can_never_be_is_refused_at_once(wish, words, cluster_of_jobs, tmp_path):
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=words):
        slurm.start_cluster(1, log_directory=tmp_path, timeout=60, **(JOBS | wish))
    assert time.monotonic() - begun < 20 and not queue()


@real
def test_a_worker_that_cannot_start_shows_the_end_of_its_log(cluster_of_jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "WORKER_OPTIONS", ["--no-such-option"])
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"0 of 1 workers arrived, and no more can come\.\n") as caught:
        slurm.start_cluster(1, log_directory=tmp_path, timeout=90, **JOBS)
    assert re.search(
        r"job \d+: FAILED, reason: NonZeroExitCode\nThe last lines of .*\.err:\n(.*\n)*.*no-such-option", str(caught.value)
    )
    assert time.monotonic() - begun < 60


@real
@pytest.mark.timeout(400)
def test_a_job_runs_the_demo_notebook_from_sbatch_to_the_table(cluster_of_jobs, tmp_path, cache):
    """What one writes for tonight: the sweep of notebook 03 as one batch job on 2 CPUs."""
    grid = {"strategy": "sgwu+udpa", "data": "digits", "kind": "threads", "train_samples": 300, "test_samples": 60}
    grid |= {"passes": 2.0, "local_steps": 4, "target": 0.2}
    options = " ".join(f"--grid {name}={value}" for name, value in grid.items())
    script = tmp_path / "tonight.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --job-name=tonight --cpus-per-task=2 --time=10\n#SBATCH --output=%x-%j.log\n"
        f"{sys.executable} -m labkit sweep {ROOT}/notebooks/03-update-the-weights.ipynb {options} --out table\n"
    )
    submitted = run("sbatch", "--parsable", script, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    until(lambda: not queue(), limit=360)
    log = (tmp_path / f"tonight-{job}.log").read_text()
    assert "JobState=COMPLETED" in run("scontrol", "show", "job", job).stdout, log
    assert re.search(r"^.*sgwu\+udpa.*\bdone\b", log, re.MULTILINE), log
    assert list(labkit.summary(tmp_path / "table").status) == ["done"]


# -- without SLURM -----------------------------------------------------------------------------------------------------


def test_without_slurm_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no sbatch on the PATH: .* apt-get install slurm-wlm"):
        slurm.start_cluster(1)


def test_without_dask_jobqueue_it_says_what_to_install(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, sbatch="exit 1")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ClusterError, match=r"needs dask-jobqueue .* pip install 'labkit\[slurm\]'"):
        slurm.start_cluster(1)


def test_without_cryptography_nothing_listens_beyond_loopback(tmp_path, monkeypatch):
    _needs_jobqueue()
    stand_in(tmp_path, monkeypatch, sbatch="exit 1")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ClusterError, match=r"need TLS.*pip install 'labkit\[slurm\]', or give interface='lo'"):
        slurm.start_cluster(1, log_directory=tmp_path)


def test_what_squeue_says_is_read_whatever_it_is(tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, squeue="echo '7|PENDING|(a|b)'; echo; echo nonsense; echo '8|FAILED|NonZeroExitCode'")
    assert slurm._states(["7", "8"]) == [("7", "PENDING", "(a|b)"), ("8", "FAILED", "NonZeroExitCode")]
    (tmp_path / "dask-worker-7.err").write_text("old\n")
    (tmp_path / "dask-worker-8.out").write_text("".join(f"line {n}\n" for n in range(40)))
    os.utime(tmp_path / "dask-worker-7.err", (1, 1))
    said = slurm._why(["7", "8"], tmp_path)
    assert "job 7: PENDING, reason: (a|b)" in said and said.endswith("  line 38\n  line 39") and "line 24\n" not in said
    stand_in(tmp_path, monkeypatch, squeue="exit 1")
    assert slurm._why(["9"], tmp_path / "empty").startswith("  squeue lists none of the jobs 9\nNo job has written a log to")


def stand_in(folder, monkeypatch, **scripts):
    """Commands of that name, first on the PATH."""
    for name, text in scripts.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_the_script_of_the_tests_refuses_what_it_does_not_know():
    assert run(SCRIPT).returncode == 2 and "slurm.sh start DIR" in run(SCRIPT).stderr
    assert run(SCRIPT, "restart", "nowhere").returncode == 2
