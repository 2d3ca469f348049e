"""Distillation: one plain loop, which changes the student alone."""

from __future__ import annotations

import copy

import pytest
import torch
from stacks import batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.passes import PruneHeads, Replace


def test_new_weights_learn_and_the_teacher_stays() -> None:
    teacher, data = stack(causal=False), batches()
    before = copy.deepcopy(teacher.state_dict())
    student = attnopt.optimize(teacher, Replace("conv"), (data[0],), calibration=data)
    shared = {name: p.clone() for name, p in student.graph_module.named_parameters() if name in before}
    new = [p for name, p in student.graph_module.named_parameters() if name not in before]
    for p in new:
        p.data += 0.3 * torch.randn_like(p)
    start = copy.deepcopy(student)
    losses = attnopt.distill(student, teacher, data, 60)
    assert len(losses) == 60
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(torch.equal(p, shared[name]) for name, p in student.graph_module.named_parameters() if name in shared)
    with torch.no_grad():
        want = teacher(data[0])
        first = start(data[0])
    assert losses[0] == pytest.approx(float((first - want).square().sum() / want.square().sum()), rel=1e-5)


def test_an_optimizer_of_the_user() -> None:
    teacher, data = stack(), [(x,) for x in batches()]
    copied = copy.deepcopy(teacher)
    student = attnopt.optimize(copied, PruneHeads(heads=[1]), data[0])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)

    def loss(got: Tensor, wanted: Tensor) -> Tensor:
        return (got - wanted).abs().mean()

    losses = attnopt.distill(student, teacher, data, 8, optimizer=optimizer, loss=loss)
    assert sum(losses[4:]) < sum(losses[:4])
    reference = attnopt.optimize(copy.deepcopy(teacher), PruneHeads(heads=[1]), data[0])
    steps = torch.optim.SGD(reference.parameters(), lr=0.01)
    for step in range(8):
        (x,) = data[step % 4]
        found = loss(reference(x), teacher(x).detach())
        assert losses[step] == pytest.approx(float(found.detach()))
        steps.zero_grad()
        found.backward()
        steps.step()


def test_the_same_seed_gives_the_same_history() -> None:
    teacher, start, data = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)), batches()

    def history(seed: int) -> list[float]:
        return attnopt.distill(copy.deepcopy(start), teacher, data, 6, seed=seed)

    state = torch.get_rng_state()
    first = history(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert history(0) == first != history(1)


def test_what_would_change_the_teacher_is_refused() -> None:
    teacher, data = stack(), batches()
    student = attnopt.optimize(teacher, PruneHeads(heads=[1]), (data[0],))
    for optimizer in (
        torch.optim.SGD(student.parameters(), 0.1),
        torch.optim.SGD([*teacher.parameters(), *student.parameters()][:1], 0.1),
    ):
        with pytest.raises(attnopt.PolicyError, match="distill: the optimizer"):
            attnopt.distill(student, teacher, data, 1, optimizer=optimizer)
    with pytest.raises(attnopt.PolicyError, match="shares all of its parameters"):
        attnopt.distill(attnopt.optimize(teacher, "fuse", (data[0],)), teacher, data, 1)
    with pytest.raises(attnopt.PolicyError, match="steps=-1"):
        attnopt.distill(student, teacher, data, -1)
    elsewhere = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(attnopt.PolicyError, match="has no parameter of the student"):
        attnopt.distill(student, copy.deepcopy(teacher), data, 1, optimizer=elsewhere)


def test_outputs_without_numbers() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x).argmax(-1)

    with pytest.raises(attnopt.PolicyError, match="returns no floating-point tensor"):
        attnopt.distill(Picks(), Picks(), batches(), 1)
