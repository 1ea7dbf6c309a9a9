"""Stochastic depth, of each sequence by itself or of a subset, and activation checkpointing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dino.models import VisionTransformer, ViTSpec
from dino.models.drop_path import draw_factors, draw_subsets
from dino.models.tokens import Group, unpack

SPEC = ViTSpec(32, 3, 4, patch_size=4, image_size=16, layer_scale=1.0, registers=2, mask_token=True)


def test_drop_path_is_for_training_only(randomise):
    """Evaluation is that of a model without it, and training too if the rate is 0."""
    plain = randomise(VisionTransformer(SPEC))
    dropping = VisionTransformer(SPEC, drop_path=0.9).eval()
    dropping.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(dropping(images), plain(images))
    assert torch.equal(plain.train()(images), plain.eval()(images))
    assert not torch.equal(dropping.train()(images), plain(images))


def test_drop_path_keeps_the_expectation():
    """Whole sequences, each branch and block by itself, lose it at a rate that grows; the others are scaled up."""
    groups, like = [Group(3000, 2, (1, 1)), Group(3000, 5, (2, 2))], torch.zeros(())
    of_blocks = draw_factors(groups, [1, 5], 0.4, 5, like)
    assert [factors.shape for factors in of_blocks] == [(2, 3000 * (2 + 5), 1)] * 4 + [(2, 3000 * (1 + 5), 1)]
    branches = []
    for rate, factors, length in zip((0, 0.1, 0.2, 0.3, 0.4), of_blocks, (2, 2, 2, 2, 1), strict=True):
        for branch in factors[..., 0]:
            first, second = branch[: 3000 * length].view(3000, -1), branch[3000 * length :].view(3000, -1)
            for sequences in (first, second):
                assert torch.equal(sequences.amin(dim=1), sequences.amax(dim=1))
            branches.append(torch.cat([first[:, 0], second[:, 0]]))
            expected = [0, 1 / (1 - rate)] if rate else [1]
            torch.testing.assert_close(branches[-1].unique(), torch.tensor(expected, dtype=torch.float32))
            assert abs(branches[-1].mean() - 1) < 4 * math.sqrt(rate / (1 - rate) / 6000) + 1e-6
    correlations = torch.corrcoef(torch.stack(branches[2:])).fill_diagonal_(0)
    assert correlations.abs().max() < 4.5 / math.sqrt(6000)
    of_last = branches[-1]
    assert abs(torch.corrcoef(torch.stack([of_last[:-1], of_last[1:]]))[0, 1]) < 4 / math.sqrt(6000)


@pytest.mark.parametrize("subset", [False, True])
def test_activation_checkpointing_drops_the_same_paths(subset, randomise):
    """Gradients with activation checkpointing are those without: the draws of the first pass hold for the second."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = randomise(VisionTransformer(replace(SPEC, depth=3), drop_path=0.5, drop_subset=subset)).train()
        for block in model.blocks:
            block.activation_checkpointing = again
        torch.manual_seed(1)
        model(torch.randn(6, 3, 8, 8)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_drop_path_leaves_branches_out_of_the_block(randomise):
    """At rate ½, each copy of an image goes through attention or not and through the MLP or not, doubled if so."""
    model = randomise(VisionTransformer(replace(SPEC, depth=2), drop_path=0.5)).train()
    image = torch.randn(1, 3, 8, 8)
    tokens, block = model.prepare_tokens(image)[0], model.blocks[1]
    group = [Group(1, len(tokens), (2, 2))]
    tokens = model.blocks[0](tokens, group)  # rate 0
    expected = []
    for attention in (0, 2):
        attended = tokens + attention * block.ls1(block.attn(block.norm1(tokens), group))
        expected += [attended + mlp * block.ls2(block.mlp(block.norm2(attended))) for mlp in (0, 2)]
    outputs = model.forward_features(image.expand(400, -1, -1, -1))["x_prenorm"]
    distances = torch.stack([(outputs - choice).abs().amax(dim=(1, 2)) for choice in expected])  # (4, 400)
    assert distances.amin(dim=0).max() < 1e-4
    counts = distances.argmin(dim=0).bincount(minlength=4)
    assert (counts - 100).abs().max() < 4 * math.sqrt(400 * 0.25 * 0.75)


def test_drop_path_of_a_subset_computes_only_that(randomise):
    """A fixed number of each group goes through a branch, together, and is scaled up by how many are missing."""
    groups, lengths = [Group(10, 3, (1, 2)), Group(4, 2, (1, 1)), Group(1, 5, (2, 2))], [3, 2, 5]
    block = randomise(VisionTransformer(SPEC)).train().blocks[0]
    seen = []
    block.attn.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs[0]), inputs[1])))
    nn.init.zeros_(block.ls2.gamma)
    tokens = torch.randn(10 * 3 + 4 * 2 + 5, 32)
    output = block(tokens, groups, drop=draw_subsets(groups, lengths, 0.4, 1, tokens)[0]) - tokens
    assert seen == [(6 * 3 + 2 * 2 + 5, [Group(6, 3, (1, 2)), Group(2, 2, (1, 1)), Group(1, 5, (2, 2))])]
    branch = unpack(block.ls1(block.attn(block.norm1(tokens), groups)), groups)
    for part, whole, count, scale in zip(unpack(output, groups), branch, (6, 2, 1), (10 / 6, 2, 1), strict=True):
        through = part[:, 0, 0] != 0
        assert through.sum() == count
        torch.testing.assert_close(part[through], scale * whole[through], rtol=1e-4, atol=1e-5)
        assert not part[~through].any()


def test_a_subset_is_drawn_anew_and_evenly():
    """For each block and branch by itself."""
    counts = torch.zeros(4, 10)
    for _ in range(2000):
        subsets = draw_subsets([Group(10, 1, (1, 1))], [1], 0.4, 2, torch.zeros(()))
        rows = torch.cat([subset.inputs for subset in subsets])
        assert rows.shape == (4, 6)
        counts.scatter_add_(1, rows, torch.ones(4, 6))
    assert counts.sum() == 4 * 2000 * 6
    assert (counts - 1200).abs().max() < 4.5 * math.sqrt(2000 * 0.6 * 0.4)


@torch.no_grad()
def test_drop_path_of_a_subset_in_the_network(randomise):
    """Each image is as without the block's branches, or with them scaled."""
    model = randomise(VisionTransformer(replace(SPEC, depth=1), drop_path=0.5, drop_subset=True)).train()
    block, images = model.blocks[0], torch.randn(6, 3, 8, 8)
    tokens, groups = model._embed([images])
    attended = unpack(block.ls1(block.attn(block.norm1(tokens), groups)), groups)[0]
    before = unpack(tokens, groups)[0]
    options = []
    for attention in (0, 2):
        middle = before + attention * attended
        fed = block.ls2(block.mlp(block.norm2(middle.flatten(0, 1)))).view_as(middle)
        options += [model.norm(middle + mlp * fed)[:, 0] for mlp in (0, 2)]
    found = model(images)
    distances = torch.stack([(found - option).abs().amax(dim=1) for option in options])  # (4, 6)
    assert distances.amin(dim=0).max() < 1e-5
    choices = distances.argmin(dim=0)
    assert (choices >= 2).sum() == 3  # half of them through attention
    assert (choices % 2).sum() == 3  # and half through the MLP


def test_gradients_with_a_subset_reach_every_parameter():
    model = VisionTransformer(replace(SPEC, depth=2), drop_path=0.5, drop_subset=True).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    unused = {"mask_token"} if model.mask_token is not None else set()
    assert {name for name, value in model.named_parameters() if value.grad is None} <= unused
