"""The teacher follows the student as an exponential moving average of its parameters, and of those only."""

import copy

import pytest
import torch
from torch import nn

from dino.methods.ema import synchronise_buffers, update_teacher


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
        update_teacher(teacher, student, momentum=0.75)
        assert teacher.weight.tolist() == [[expected, expected]]


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.996, 0.9999])
def test_every_parameter_is_averaged(momentum):
    teacher, student = network(0), network(1)
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    update_teacher(teacher, student, momentum)
    for (name, value), followed in zip(teacher.named_parameters(), student.parameters(), strict=True):
        expected = momentum * before[name].double() + (1 - momentum) * followed.double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("momentum", "same_as"), [(1.0, "teacher"), (0.0, "student")])
def test_momentum_of_one_keeps_and_of_none_copies_exactly(momentum, same_as):
    teacher, student = network(0), network(1)
    expected = copy.deepcopy({"teacher": teacher, "student": student}[same_as])
    update_teacher(teacher, student, momentum)
    for value, wanted in zip(teacher.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, wanted)


def test_the_student_and_both_networks_buffers_stay():
    teacher, student = network(0), network(1)
    expected, buffers = copy.deepcopy(student), copy.deepcopy(dict(teacher.named_buffers()))
    update_teacher(teacher, student, 0.5)
    for name, value in student.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    for name, value in teacher.named_buffers():
        assert torch.equal(value, buffers[name])
        if value.is_floating_point() and value.std() > 0:
            assert not torch.equal(value, dict(student.named_buffers())[name])


def test_nothing_of_it_is_differentiated():
    teacher, student = network(0), network(1)
    update_teacher(teacher, student, 0.5)
    assert all(parameter.grad is None and parameter.grad_fn is None for parameter in teacher.parameters())


def test_one_process_alone_keeps_its_statistics():
    teacher = network(0)
    before = copy.deepcopy(teacher.state_dict())
    synchronise_buffers(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
