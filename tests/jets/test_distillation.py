"""The transformer that learns from itself: its teacher follows, empty slots and rotations do not count. Runs of it are in test_problem.py.

Used by pytest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.jets.distillation import FOLLOWS, Distilled, view
from labkit.problems import Clock
from labkit.problems.problem import noise
from tests.jets.helpers import problem

pytestmark = pytest.mark.usefixtures("cache")


def test_a_step_moves_the_student_and_the_teacher_follows(few):
    of = problem(few, pretext="distill", lr=1e-2)
    of.check()
    module, batch = of.new_module(0), of.load(np.arange(16))
    teacher = [p.clone() for p in module.teacher.parameters()]
    losses = [float(of.step(module, batch, of.optimisers(module), Clock(0, 100, 0.0, noise(0, 0)))["loss"])]
    after = [a.lerp(b, 1 - FOLLOWS) for a, b in zip(teacher, module.student.parameters(), strict=True)]  # b: after the step
    torch.testing.assert_close(list(module.teacher.parameters()), after)
    losses.append(float(of.step(module, batch, of.optimisers(module), Clock(0, 100, 0.0, noise(0, 0)))["loss"]))
    assert all(np.isfinite(losses)) and module.centre.abs().sum() > 0
    moved = [(a - b).abs().max() for a, b in zip(module.teacher.parameters(), teacher, strict=True)]
    apart = [(a - b).abs().max() for a, b in zip(module.teacher.parameters(), module.student.parameters(), strict=True)]
    assert max(moved) > 0 and max(apart) > max(moved) and not any(p.requires_grad for p in module.teacher.parameters())
    assert of.load(np.arange(3)).bins.tolist() == [[0]] * 3
    with pytest.raises(ValueError, match="'distill' has no bins, and goes alone"):
        problem(few, pretext=["mass", "distill"])
    with pytest.raises(ValueError, match="cluster_by='bins': pretext='distill' has no bins"):
        problem(few, pretext="distill", cluster_by="bins")


def test_the_loss_is_the_cross_entropy_of_the_other_view():
    module, logits = Distilled(), torch.randn(3, 4, 64)
    module.centre.normal_()
    wanted = 0.0
    for said, taught in ((0, 3), (1, 2)):
        p = ((logits[:, taught] - module.centre) / 0.04).softmax(-1)
        wanted = wanted - (p * (logits[:, said] / 0.1).log_softmax(-1)).sum(-1).mean() / 2
    torch.testing.assert_close(module.loss(logits), wanted)


def test_empty_slots_count_for_nothing_and_views_keep_distances(few):
    x = problem(few).load(np.arange(6)).x
    module = Distilled().eval()
    torch.testing.assert_close(module.embed(torch.cat([x, torch.zeros(6, 9, 8)], 1)), module.embed(x), rtol=1e-4, atol=1e-5)
    seen = view(x, torch.Generator().manual_seed(0))
    kept = seen[..., 2] != 0
    torch.testing.assert_close(seen[..., :2].norm(dim=-1)[kept], x[..., :2].norm(dim=-1)[kept], rtol=1e-4, atol=1e-5)
    assert kept[:, 0].all() and not kept.all() and not torch.equal(seen[..., 0][kept], x[..., 0][kept])
