"""Linear layers and attention that keep little for the backward pass give what the plain statement gives."""

import copy
from dataclasses import replace

import pytest
import torch
from counting import Counted
from torch import Tensor, nn

from dino.models import VisionTransformer, ViTSpec
from dino.models.attention import Attention
from dino.models.linear import Gate, Linear, chain, copy_weights
from dino.models.tokens import Group
from dino.training.memory import Kept

SPEC = ViTSpec(32, 3, 4, patch_size=4, image_size=16, layer_scale=1.0)
HALF = torch.bfloat16


def plain(module: nn.Module) -> nn.Module:
    """A copy whose linear layers are torch's, so that nothing is recomputed."""
    twin = copy.deepcopy(module)
    for name, child in list(twin.named_modules()):
        if isinstance(child, Linear):
            linear = nn.Linear(child.in_features, child.out_features).to(child.weight)
            linear.load_state_dict(child.state_dict())
            twin.set_submodule(name, linear)
    return twin


def gradients(network: nn.Module, crops: list[Tensor], half: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", HALF, enabled=half):
        tokens, _ = network.train().encode_crops(crops)
    sum(part.float().square().sum() for part in tokens).backward()
    return {"tokens": torch.cat(tokens).detach()} | {
        name: value.grad for name, value in network.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_statement(half, ffn, checkpointing, randomise):
    """Bit by bit in fp32; biases are summed in fp32 under autocast, which otherwise rounds them to bf16.

    There the two differ by some of bf16's roundings (2⁻⁸ each): by 0.022 at most on a CPU with units for bf16.
    """
    network = randomise(VisionTransformer(replace(SPEC, ffn=ffn)))
    twin = plain(network)
    for block in twin.blocks:
        block.attn.positions = Unfused()
    for block in network.blocks:
        block.activation_checkpointing = checkpointing
    crops = [torch.randn(4, 3, side, side) for side in (16, 8)]
    if half:
        copy_weights(network, HALF)
    mine, expected = gradients(network, crops, half), gradients(twin, crops, half)
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        distance = (mine[name] - gradient).norm() / gradient.norm()
        assert distance < 0.03 if half else torch.equal(mine[name], gradient), name


class Unfused:
    """Positions that keep attention on torch's own way."""

    rotates = True

    def rotate(self, query: Tensor, key: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return query, key


@pytest.mark.parametrize("before", [nn.LayerNorm(8), nn.GELU(), Gate()])
def test_in_double_precision_gradients_are_those_of_differences(before):
    linear, before = Linear(4 if isinstance(before, Gate) else 8, 3).double(), before.double()
    inputs = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    parameters = [*before.parameters(), *linear.parameters()]
    assert torch.autograd.gradcheck(lambda *_: chain(before, linear, inputs), (inputs, *parameters))


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, False), (HALF, False), (HALF, True)])
def test_packed_attention_is_that_of_the_definition(dtype, units, monkeypatch):
    """softmax(q·kᵀ/√d)·v in double precision, with its gradient; with bf16, on CPUs with units for it or without."""
    monkeypatch.setattr("dino.models.attention.prefers_bf16", lambda device: units)
    module = Attention(16, 2, VisionTransformer(SPEC).positions).train()
    groups, lengths = [Group(3, 5, (2, 2)), Group(2, 4, (1, 3))], [5, 1]
    tokens = torch.randn(23, 16, requires_grad=True)
    with torch.autocast("cpu", HALF, enabled=dtype == HALF):
        found = module(tokens, groups, lengths)
    found.double().square().sum().backward()
    exact, same = copy.deepcopy(module).double(), tokens.detach().double().requires_grad_()
    exact.zero_grad()
    expected = []
    for part, (batch, length, _), asked in zip(same.split([15, 8]), groups, lengths, strict=True):
        query, key, value = exact.qkv(part).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / 8**0.5).softmax(dim=-1)
        expected.append((weights @ value).transpose(1, 2).flatten(2)[:, :asked].flatten(0, 1))
    output = exact.proj(torch.cat(expected))
    output.square().sum().backward()
    pairs = [(found, output), (tokens.grad, same.grad), (module.qkv.weight.grad, exact.qkv.weight.grad)]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() < (0.02 if dtype == HALF else 1e-6) * theirs.norm()


class TestCopies:
    def test_replace_a_cast_of_each_weight_and_follow_the_weights(self, randomise):
        network, images = randomise(VisionTransformer(SPEC)).train(), torch.randn(2, 3, 16, 16)

        def run() -> tuple[Tensor, int]:
            with torch.no_grad(), torch.autocast("cpu", HALF), Counted() as counted:
                return network(images), counted.by_name["_to_copy"]

        (output, casts) = run()
        copy_weights(network, HALF)
        with_copies, fewer = run()
        assert torch.equal(output, with_copies)
        assert casts - fewer == 2 * 4 * SPEC.depth
        with torch.no_grad():
            network.blocks[0].mlp.fc1.weight.mul_(1.5)
        changed, one_more = run()  # a copy that is not of these weights is not used
        assert one_more == fewer + 2
        network.blocks[0].mlp.fc1.copies = None
        assert torch.equal(changed, run()[0])
        assert not torch.equal(changed, output)

    def test_weights_that_change_before_the_backward_pass_are_refused(self):
        linear = Linear(4, 4).train()
        copy_weights(linear, HALF)
        with torch.autocast("cpu", HALF):
            output = linear(torch.randn(2, 4, requires_grad=True))
        with torch.no_grad():
            linear.weight.add_(1)
        copy_weights(linear, HALF)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()

    def test_are_no_part_of_the_state(self):
        linear = Linear(4, 4)
        copy_weights(linear, HALF)
        assert set(linear.state_dict()) == {"weight", "bias"}
        twin = copy.deepcopy(linear)
        assert twin.in_precision(HALF)[0] is not twin.copies[0]  # of other parameters, which will change by themselves
        assert linear.in_precision(HALF)[0] is linear.copies[0]


@pytest.mark.parametrize("part", ["norm1", "attn.qkv", "mlp.act", "mlp.fc2"])
@pytest.mark.parametrize("training", [True, False])
def test_hooks_are_called(part, training):
    network = VisionTransformer(SPEC).train(training)
    calls = []
    network.blocks[1].get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    network(torch.randn(2, 3, 16, 16))
    assert calls == [part]


@pytest.mark.parametrize(("half", "share"), [(False, 0.70), (True, 0.60)])
def test_less_is_kept_for_the_backward_pass(half, share):
    network = VisionTransformer(replace(SPEC, embed_dim=64, layer_scale=0.0))
    twin, kept = plain(network), []
    for block in twin.blocks:
        block.attn.positions = Unfused()
    for each in (network, twin):
        with torch.autocast("cpu", HALF, enabled=half), Kept(each.parameters()) as counted:
            each.train().encode_crops([torch.randn(8, 3, side, side) for side in (16, 8)])
        kept.append(counted.bytes)
    assert kept[0] < share * kept[1]
