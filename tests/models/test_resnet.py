"""The ResNet gives torchvision's features behind the Vision Transformer's interface."""

import pytest
import torch
from published import torchvisions, without_classifier
from torch import nn

from dino.models import ResNet, ResNetSpec

WIDTHS = {"resnet18": 512, "resnet50": 2048}


def same_pair(arch: str) -> tuple[ResNet, nn.Module]:
    """Ours and torchvision's with the same weights; torchvision's gives pooled features instead of classes."""
    theirs = torchvisions(arch)
    ours = ResNet(ResNetSpec(arch)).eval()
    ours.load_state_dict(without_classifier(theirs))
    theirs.fc = nn.Identity()
    return ours, theirs


@pytest.mark.parametrize("arch", WIDTHS)
@torch.no_grad()
def test_torchvisions_weights_give_its_features(arch):
    ours, theirs = same_pair(arch)
    images = torch.randn(2, 3, 64, 96)
    assert ours.embed_dim == WIDTHS[arch]
    torch.testing.assert_close(ours(images), theirs(images))


@torch.no_grad()
def test_our_weights_load_into_torchvision():
    ours = ResNet(ResNetSpec("resnet18")).eval()
    theirs = torchvisions("resnet18")
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), ours(images))


@torch.no_grad()
def test_forward_features():
    """Patches are torchvision's last feature map in row order, and the class token is their mean."""
    ours, theirs = same_pair("resnet18")
    images = torch.randn(2, 3, 64, 96)
    feature_map = nn.Sequential(*list(theirs.children())[:-2])(images)
    features = ours.forward_features(images)
    assert feature_map.shape == (2, 512, 2, 3)
    assert features["x_norm_patchtokens"].shape == (2, 6, 512)
    assert features["x_norm_regtokens"].shape == (2, 0, 512)
    torch.testing.assert_close(features["x_norm_patchtokens"][:, 4], feature_map[:, :, 1, 1])
    torch.testing.assert_close(features["x_norm_clstoken"], features["x_norm_patchtokens"].mean(dim=1))
    torch.testing.assert_close(features["x_norm_clstoken"], ours(images))


@torch.no_grad()
def test_list_of_crops():
    ours, theirs = same_pair("resnet18")
    crops = [torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 32)]
    outputs = ours(crops)
    assert [output.shape for output in outputs] == [(2, 512), (4, 512)]
    torch.testing.assert_close(outputs, [theirs(batch) for batch in crops])


@torch.no_grad()
def test_patches_of_some_sizes(randomise):
    """The class token is the mean of its patches; masks would need a token that there is not."""
    ours = randomise(ResNet(ResNetSpec("resnet18")))
    crops = [torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 32)]
    classes, patches = ours.encode_crops(crops, patches_of=1)
    assert [tokens.shape for tokens in classes + patches] == [(2, 512), (4, 512), (2, 4, 512)]
    torch.testing.assert_close(patches[0].mean(dim=1), classes[0])
    assert not ours.has_patches
    with pytest.raises(ValueError, match="no mask token"):
        ours.encode_crops(crops, torch.ones(1, 4, dtype=torch.bool))


@torch.no_grad()
def test_one_channel():
    """A kernel summed over colours sees a grey image as the original sees its three equal channels."""
    _, theirs = same_pair("resnet18")
    ours = ResNet(ResNetSpec("resnet18", in_chans=1)).eval()
    state = without_classifier(theirs)
    state["conv1.weight"] = state["conv1.weight"].sum(dim=1, keepdim=True)
    ours.load_state_dict(state)
    grey = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(ours(grey), theirs(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_norm_in_training():
    """Each crop size is normalised by its own statistics, and the running ones are updated once per size, in order."""
    ours, theirs = same_pair("resnet18")
    crops = [torch.randn(4, 3, 64, 64), 2 + torch.randn(8, 3, 32, 32)]
    before = ours.bn1.running_mean.clone()
    outputs, expected = ours.train()(crops), [theirs.train()(batch) for batch in crops]
    torch.testing.assert_close(outputs, expected)
    assert ours.bn1.num_batches_tracked == 7 + 2
    assert not torch.allclose(ours.bn1.running_mean, before)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval()(crops)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
