"""Which parameters are decayed, what an optimizer does with them, and that a broken step leaves no trace."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dino.config.schema import OptimConfig
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import ResNet, ResNetSpec, VisionTransformer, ViTSpec
from dino.training.optimizer import build_optimizer, clip_gradients, parameter_groups, set_rates, step_unless

BLOCK_DECAYED = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
BLOCK_FREE = {
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
    *("ls1.gamma", "ls2.gamma"),
}
HEAD_DECAYED = {"head.mlp.0.weight", "head.mlp.2.weight", "head.last_layer.weight_v"}
HEAD_FREE = {"head.mlp.0.bias", "head.mlp.2.bias"}
TOKENS = {"backbone.cls_token", "backbone.pos_embed", "backbone.register_tokens", "backbone.mask_token"}


def transformer(norm_last_layer: bool = True) -> Network:
    spec = ViTSpec(16, 2, 2, 4, 8, registers=2, layer_scale=1e-5, mask_token=True)
    return Network(VisionTransformer(spec), DINOHead(16, 12, 2, 24, 8, norm_last_layer))


def names(network: nn.Module, group: dict) -> set[str]:
    return {name for name, value in network.named_parameters() if any(value is member for member in group["params"])}


class TestGroups:
    """reference/meta-systems.md §7.8: class token, positions, registers and weight_g are decayed, as published."""

    def test_vision_transformer(self):
        network = transformer()
        decayed, free = parameter_groups(network)
        blocks = [f"backbone.blocks.{index}." for index in range(2)]
        matrices = {block + name for block in blocks for name in BLOCK_DECAYED} | {"backbone.patch_embed.proj.weight"}
        vectors = {block + name for block in blocks for name in BLOCK_FREE}
        assert names(network, decayed) == matrices | TOKENS | HEAD_DECAYED
        norms = {"backbone.norm.weight", "backbone.norm.bias"}
        assert names(network, free) == vectors | norms | HEAD_FREE | {"backbone.patch_embed.proj.bias"}
        assert (decayed["decayed"], free["decayed"]) == (True, False)
        assert free["weight_decay"] == 0

    def test_tokens_may_be_exempt(self):
        network = transformer()
        with_tokens, without = parameter_groups(network, True), parameter_groups(network, False)
        assert names(network, with_tokens[0]) - names(network, without[0]) == TOKENS
        assert names(network, without[1]) - names(network, with_tokens[1]) == TOKENS

    @pytest.mark.parametrize("decay_tokens", [True, False])
    def test_learned_lengths_of_prototypes_are_decayed(self, decay_tokens):
        network = transformer(norm_last_layer=False)
        assert "head.last_layer.weight_g" in names(network, parameter_groups(network, decay_tokens)[0])

    def test_what_is_not_trained_is_in_no_group(self):
        network = transformer(norm_last_layer=True)
        grouped = set().union(*(names(network, group) for group in parameter_groups(network)))
        assert set(dict(network.named_parameters())) - grouped == {"head.last_layer.weight_g"}

    @pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
    def test_resnet(self, arch):
        """Convolutions are decayed, BatchNorm's gains and all biases are not."""
        network = Network(ResNet(ResNetSpec(arch)), DINOHead(512 if arch == "resnet18" else 2048, 12, 2, 24, 8))
        decayed, free = parameter_groups(network)
        kinds = {
            f"{module_name}.{name}": type(module)
            for module_name, module in network.backbone.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }
        convolutions = {f"backbone.{name}" for name, kind in kinds.items() if kind is nn.Conv2d}
        norms = {f"backbone.{name}" for name, kind in kinds.items() if kind is nn.BatchNorm2d}
        assert names(network, decayed) == convolutions | HEAD_DECAYED
        assert names(network, free) == norms | HEAD_FREE
        assert len(convolutions) == {"resnet18": 20, "resnet50": 53}[arch]

    def test_no_parameter_is_in_two_groups(self):
        network = transformer()
        members = [id(value) for group in parameter_groups(network) for value in group["params"]]
        assert len(members) == len(set(members))


class TestAdamW:
    def test_equals_the_textbook_over_three_steps(self):
        """Loshchilov & Hutter 2019, algorithm 2, in double precision, with rates that change from step to step."""
        torch.manual_seed(0)
        module = nn.Linear(3, 2).double()
        value = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        first = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
        second = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
        optimizer = build_optimizer(module, OptimConfig(betas=[0.8, 0.95]))
        for step, (lr, decay) in enumerate([(0.1, 0.04), (0.05, 0.2), (0.01, 0.4)], 1):
            set_rates(optimizer, lr, decay)
            for name, parameter in module.named_parameters():
                gradient = torch.randn_like(parameter)
                parameter.grad = gradient.clone()
                first[name] = 0.8 * first[name] + 0.2 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                mean, square = first[name] / (1 - 0.8**step), second[name] / (1 - 0.95**step)
                shrink = decay if name == "weight" else 0.0
                value[name] = value[name] - lr * (mean / (square.sqrt() + 1e-8) + shrink * value[name])
            optimizer.step()
            for name, parameter in module.named_parameters():
                torch.testing.assert_close(parameter.detach(), value[name], rtol=1e-12, atol=1e-14)

    def test_published_settings(self):
        optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig())
        for group in optimizer.param_groups:
            assert tuple(group["betas"]) == (0.9, 0.999)
            assert group["eps"] == 1e-8
            assert group["fused"]

    def test_rates_reach_the_groups(self):
        network = transformer()
        optimizer = build_optimizer(network, OptimConfig())
        set_rates(optimizer, 0.125, 0.25)
        assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


class TestSGD:
    """DINO's optimizer for ResNet-50."""

    def pair(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
        """A module with the project's optimizer, and its twin with torch's plain SGD of momentum 0.9."""
        torch.manual_seed(0)
        mine = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        peer = copy.deepcopy(mine)
        groups = [
            {"params": [value for value in peer.parameters() if value.ndim > 1]},
            {"params": [value for value in peer.parameters() if value.ndim <= 1], "weight_decay": 0.0},
        ]
        plain = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3, fused=False, foreach=False)
        return mine, build_optimizer(mine, OptimConfig(name="sgd")), peer, plain

    def test_is_torchs_with_momentum_and_rates_that_change(self):
        mine, optimizer, peer, plain = self.pair()
        generator = torch.Generator().manual_seed(0)
        for lr, decay in [(0.1, 0.3), (0.05, 0.2), (0.01, 0.4), (0.02, 0.0)]:
            set_rates(optimizer, lr, decay)
            for group, shrink in zip(plain.param_groups, (decay, 0.0), strict=True):
                group["lr"], group["weight_decay"] = lr, shrink
            for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
                one.grad = torch.randn(one.shape, generator=generator)
                other.grad = one.grad.clone()
            optimizer.step()
            plain.step()
            for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
                torch.testing.assert_close(one, other)

    def test_prototypes_that_stood_still_begin_to_move(self):
        """As after `objective.freeze_last_layer_steps`: until then the last layer has no gradient."""
        mine, optimizer, peer, plain = self.pair()
        set_rates(optimizer, 0.1, 0.3)
        for step in range(4):
            for number, (one, other) in enumerate(zip(mine.parameters(), peer.parameters(), strict=True)):
                frozen = step < 2 and number >= 2
                one.grad = None if frozen else torch.full_like(one, step + 1.0)
                other.grad = None if frozen else one.grad.clone()
            step_unless(optimizer, torch.tensor(False))
            plain.step()
            for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
                torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("pattern", [(True, False, False), (False, True, True, False)])
    def test_broken_steps_are_as_if_never_taken(self, pattern):
        """Also a first step, when nothing has any momentum yet."""
        mine, optimizer, peer, plain = self.pair()
        set_rates(optimizer, 0.1, 0.3)
        generator = torch.Generator().manual_seed(0)
        for broken in pattern:
            for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
                one.grad = torch.randn(one.shape, generator=generator)
                other.grad = one.grad.clone()
                if broken:
                    one.grad[0] = math.nan
            before = copy.deepcopy(mine.state_dict())
            step_unless(optimizer, torch.tensor(broken))
            if broken:
                assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
            else:
                plain.step()
        for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(one, other)
            buffers = (state.state[of]["momentum_buffer"] for state, of in ((optimizer, one), (plain, other)))
            torch.testing.assert_close(*buffers)

    def test_a_broken_first_step_leaves_no_momentum(self):
        """Torch's fused SGD makes its buffers without filling them, and leaves them so where the step is left out."""
        module = nn.Linear(100, 100)
        optimizer = build_optimizer(module, OptimConfig(name="sgd"))
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        left = [torch.full_like(parameter, 7.0) for parameter in module.parameters()]  # what memory may hold
        del left
        step_unless(optimizer, torch.tensor(True))
        for parameter in module.parameters():
            assert not optimizer.state[parameter].get("momentum_buffer", torch.zeros(1)).any()


def with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (1,))]
    for number, parameter in enumerate(parameters):
        parameter.grad = scale * (number + 0.2) * torch.randn(parameter.shape, generator=generator)
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient: a frozen layer


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class TestClipping:
    @pytest.mark.parametrize("largest", [0.01, 1.0, 3.0, 1e6])
    def test_global_is_torchs(self, largest):
        mine, peer = with_gradients(), with_gradients()
        expected = nn.utils.clip_grad_norm_(peer, largest)
        norm = clip_gradients(mine, largest, "global")
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(gradients(mine), gradients(peer))

    @pytest.mark.parametrize("largest", [0.01, 1.0, 3.0, 1e6])
    def test_parameter_is_dinos(self, largest):
        """main_dino.py: each tensor by itself, scaled where max / (norm + 1e-6) < 1."""
        mine, peer = with_gradients(), with_gradients()
        for gradient in gradients(peer):
            coefficient = largest / (math.sqrt(float((gradient.double() ** 2).sum())) + 1e-6)
            if coefficient < 1:
                gradient.mul_(coefficient)
        clip_gradients(mine, largest, "parameter")
        torch.testing.assert_close(gradients(mine), gradients(peer))

    @pytest.mark.parametrize("scope", ["global", "parameter"])
    @pytest.mark.parametrize("largest", [0.0, 0.5])
    def test_returns_the_global_norm_from_before(self, scope, largest):
        parameters = with_gradients()
        expected = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients(parameters)))
        assert clip_gradients(parameters, largest, scope).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("scope", ["global", "parameter"])
    def test_nought_leaves_gradients_as_they_are(self, scope):
        mine, peer = with_gradients(1e6), with_gradients(1e6)
        clip_gradients(mine, 0.0, scope)
        assert all(torch.equal(one, other) for one, other in zip(gradients(mine), gradients(peer), strict=True))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("scope", ["global", "parameter"])
    def test_a_broken_gradient_shows_in_the_norm(self, bad, scope):
        parameters = with_gradients()
        parameters[1].grad[2] = bad
        assert not clip_gradients(parameters, 1.0, scope).isfinite()


class TestStepUnless:
    def pair(self) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
        """A module with the project's optimizer, and its twin with torch's plain AdamW."""
        torch.manual_seed(0)
        mine = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        peer = copy.deepcopy(mine)
        groups = [
            {"params": [value for value in peer.parameters() if value.ndim > 1], "weight_decay": 0.3},
            {"params": [value for value in peer.parameters() if value.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = build_optimizer(mine, OptimConfig())
        set_rates(optimizer, 0.1, 0.3)
        return mine, optimizer, peer, torch.optim.AdamW(groups, lr=0.1, fused=False, foreach=False)

    def give_gradients(self, seed: int, *modules: nn.Module) -> None:
        for module in modules:
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)

    def test_broken_steps_are_as_if_never_taken(self):
        """Parameters, moments and the step count (which corrects the moments' bias) follow the good steps alone."""
        mine, optimizer, peer, plain = self.pair()
        for step, broken in enumerate([False, True, False, True, True, False]):
            self.give_gradients(step, mine, peer)
            if broken:
                next(mine.parameters()).grad.fill_(math.nan)
            step_unless(optimizer, torch.tensor(broken))
            if not broken:
                plain.step()
            for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
                torch.testing.assert_close(one, other)
        for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
            assert float(optimizer.state[one]["step"]) == 3
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizer.state[one][moment], plain.state[other][moment])

    def test_a_broken_step_changes_no_bit(self):
        mine, optimizer, _, _ = self.pair()
        self.give_gradients(0, mine)
        step_unless(optimizer, torch.tensor(False))
        before = copy.deepcopy((mine.state_dict(), optimizer.state_dict()["state"]))
        self.give_gradients(1, mine)
        step_unless(optimizer, torch.tensor(True))
        for name, value in mine.state_dict().items():
            assert torch.equal(value, before[0][name])
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                assert torch.equal(value, before[1][index][key])

    def test_a_broken_first_step(self):
        mine, optimizer, _, _ = self.pair()
        before = copy.deepcopy(mine.state_dict())
        self.give_gradients(0, mine)
        step_unless(optimizer, torch.tensor(True))
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())

    def test_a_step_afterwards_is_an_ordinary_one(self):
        """No mark is left on the optimizer."""
        mine, optimizer, peer, plain = self.pair()
        self.give_gradients(0, mine, peer)
        step_unless(optimizer, torch.tensor(True))
        self.give_gradients(1, mine, peer)
        optimizer.step()
        plain.step()
        for one, other in zip(mine.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(one, other)
