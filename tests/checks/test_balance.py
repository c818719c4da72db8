"""The gradient of each term of the loss."""

import copy

import pytest
import torch

import attention_transfer as at
from attention_transfer.checks.balance import term_gradients


def small(width: int = 1) -> torch.nn.Module:
    return at.create_model(f"wrn-10-{width}", 10)


@pytest.fixture
def transfer() -> at.Transfer:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    methods = [at.ActivationTransfer(2.0), at.KnowledgeDistillation(0.5)]
    return at.Transfer(small(), small(2), methods, example=x).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(8, 3, 16, 16), torch.arange(8)


def test_norms_are_those_of_the_backward_pass_of_each_term(transfer: at.Transfer) -> None:
    x, y = batch()
    norms = term_gradients(transfer, x, y, 0.0)
    assert list(norms) == ["ce", "at", "kd"]
    for term, norm in norms.items():
        one = copy.deepcopy(transfer)
        one(x, y, 0.0).parts[term].backward()
        grads = [p.grad for p in one.student.parameters() if p.grad is not None]
        expected = torch.cat([g.flatten() for g in grads]).norm()
        assert norm == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_changes(transfer: at.Transfer) -> None:
    x, y = batch()
    before = copy.deepcopy(transfer.state_dict())
    state = torch.get_rng_state()
    term_gradients(transfer, x, y, 0.0)
    after = transfer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in transfer.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert transfer.student.training


def test_a_frozen_student_has_no_gradient(transfer: at.Transfer) -> None:
    transfer.student.requires_grad_(False)
    assert set(term_gradients(transfer, *batch(), 0.0).values()) == {0.0}
