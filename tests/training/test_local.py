"""Plain training in one process: early stopping. Bit for bit the training of a worker: tests/subnets/test_train.py."""

from __future__ import annotations

import pytest

from labkit.training.local import fit
from tests.subnets.helpers import problem, same

pytestmark = pytest.mark.usefixtures("cache")


def test_early_stopping_keeps_the_best_weights():
    a_problem = problem()
    module, held = a_problem.build(0), a_problem.score_indices()
    done = fit(a_problem, module, a_problem.train_indices(), held, epochs=60, patience=2, seed=0)
    assert done.epochs == done.best + 2 < 60 and a_problem.measure(module, held) == {"loss": done.loss, "score": done.score}
    longer = a_problem.build(0)
    fit(a_problem, longer, a_problem.train_indices(), held, epochs=done.best, patience=None, seed=0)
    assert same({k: v.numpy() for k, v in module.state_dict().items()}, {k: v.numpy() for k, v in longer.state_dict().items()})
