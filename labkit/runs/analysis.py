"""What faults have left behind: what does not add up in the record of a run, and how long a loss kept the others waiting.

Both come from the run directory alone, so that any run can be asked, whatever happened to it.

Used through `labkit.chaos`, by the chaos notebooks and the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import PartitionError, RunError
from labkit.partition import UDPA
from labkit.runs import checkpoints
from labkit.runs.events import effective

if TYPE_CHECKING:
    import pandas as pd

    from labkit.training.run import Run


def audit(run: Run) -> list[str]:
    """What does not add up in the record of a run that has ended; an empty list is what one hopes for.

    All samples of the budget were merged, each merge has its push, versions and events are numbered without holes, and the newest
    checkpoint holds the last version and every sample exactly once.
    """
    wrong, events = [], run.events
    if list(events.seq) != list(range(len(events))):
        wrong.append("events are not numbered 0, 1, 2, ...")
    counted = effective(events)
    merges, pushes = (counted[counted.kind == kind] for kind in ("merge", "push"))
    joint = int(run.events.worker.nunique()) if run.config.update["name"] == "allreduce" else 1  # they stop together
    if not run.config.budget - joint < merges.samples.sum() <= run.config.budget:
        wrong.append(f"{int(merges.samples.sum())} of {run.config.budget} samples were merged")
    steps = merges.version.drop_duplicates().astype(int).tolist()
    if steps != list(range(1, len(steps) + 1)):
        wrong.append("versions are not numbered 1, 2, 3, ...")
    for worker, own in merges.groupby("worker"):
        sent = list(pushes.loc[pushes.worker == worker, ["seq", "samples"]].itertuples(index=False))
        for merge in own.itertuples():
            while sent and (sent[0].seq > merge.seq or sent[0].samples != merge.samples):
                del sent[0]  # a push that was never merged: its worker was lost while it waited for the others
            if not sent:
                wrong.append(f"a merge of {int(merge.samples)} samples of worker {int(worker)} has no push")
                break
            del sent[0]
    try:
        version, refused = checkpoints.newest(run.path)
        wrong += refused
        if steps and version != steps[-1]:
            wrong.append(f"the newest checkpoint holds version {version} of {steps[-1]}")
        UDPA().load_state_dict(checkpoints.read_state(run.path, version)[1]["partition"])
    except (RunError, PartitionError) as error:
        wrong.append(str(error))
    return wrong


def losses(run: Run, faults: pd.DataFrame | None = None) -> pd.DataFrame:
    """How long a lost worker kept the others waiting: a row for each loss, with seconds, worker, message, waited_s and left.

    waited_s is the longest wait that the loss found among the others: from their push or join, or from the start of a pass that the
    loss has broken off (all-reduce), to their next release. With the `faults` of a storm none begins before the fault itself.
    Waiting that the barrier would have asked for anyhow is in it. left says how many samples of the budget were not merged yet:
    when all of them are handed out, the others wait for those of the lost worker under any update.
    """
    import pandas as pd

    events, rows = run.events, []
    merged = effective(events).query("kind == 'merge'")
    ended = events.seconds[events.kind == "merge"].max()
    for loss in events[(events.kind == "leave") & events.message.fillna("").ne("") & (events.seconds < ended)].itertuples():
        began, waits = -np.inf, [0.0]
        if faults is not None:
            own = faults[(faults.worker == loss.worker) & faults.fault.isin(["kill", "freeze", "drop"])]
            began = own.seconds[own.seconds <= loss.seconds].max() if (own.seconds <= loss.seconds).any() else began
        others = events[(events.worker != loss.worker) & events.kind.isin(["join", "push", "regroup", "release", "leave"])]
        for _, own in others.groupby("worker"):
            after = own[(own.seq > loss.seq) & own.kind.isin(["release", "leave", "join"])].head(1)
            if after.empty or after.kind.iloc[0] != "release":
                continue
            before = own[own.seq < after.seq.iloc[0]]
            since = before[before.kind.isin(["push", "release", "join"])].tail(1)
            broken = before.kind.iloc[-1:].eq("regroup").any()
            if len(since) and since.seconds.iloc[0] <= loss.seconds and (since.kind.iloc[0] != "release" or broken):
                waits.append(float(after.seconds.iloc[0] - max(since.seconds.iloc[0], began)))
        left = run.config.budget - merged.samples[merged.seq < loss.seq].sum()
        rows.append((loss.seconds, int(loss.worker), loss.message, round(max(waits), 3), int(left)))
    return pd.DataFrame(rows, columns=["seconds", "worker", "message", "waited_s", "left"])
