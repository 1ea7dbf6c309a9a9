"""The teacher follows the student as an exponential moving average of its parameters, and of those only."""

import copy

import pytest
import torch
from builders import differing, weights
from torch import nn

from dino.methods.ema import synchronise_buffers, update_average


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    module[1].running_mean.normal_()
    module[0].bias.requires_grad_(False)  # as `weight_g`: not trained, but followed
    return module


def test_number_worked_by_hand():
    teacher, student = nn.Linear(2, 1), nn.Linear(2, 1)
    nn.init.constant_(teacher.weight, 10.0)
    nn.init.constant_(student.weight, 20.0)
    for expected in (12.5, 14.375, 15.78125):  # 0.75 of the old, 0.25 of the new
        update_average(teacher, student, momentum=0.75)
        assert teacher.weight.tolist() == [[expected, expected]]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.996, 0.9999, 1.0])
def test_every_parameter_is_averaged_and_nothing_else_changes(momentum):
    """Also without gradients, in either; momentum 1 and 0 are exact."""
    teacher, student = network(0), network(1)
    before, of_student = copy.deepcopy(teacher), weights(student)
    update_average(teacher, student, momentum)
    assert differing(weights(student), of_student) == set()
    for name, value in teacher.named_buffers():
        assert torch.equal(value, before.get_buffer(name))
    for name, value in teacher.named_parameters():
        expected = momentum * before.get_parameter(name).double() + (1 - momentum) * student.get_parameter(name)
        tolerance = 0.0 if momentum in (0, 1) else 1e-6
        torch.testing.assert_close(value.double(), expected.double(), rtol=tolerance, atol=0.1 * tolerance)
        assert value.grad is None
        assert value.grad_fn is None


def test_one_process_alone_keeps_its_statistics():
    teacher = network(0)
    before = weights(teacher)
    synchronise_buffers(teacher)
    assert differing(weights(teacher), before) == set()
