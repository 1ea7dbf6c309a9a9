"""Muon against its definition by singular values, against torch's, and beside torch's AdamW for everything else."""

import copy
import math

import pytest
import torch
from builders import differing
from counting import Counted
from torch import Tensor

from dino.config.schema import OptimConfig
from dino.errors import UserError
from dino.methods.heads import DINOHead
from dino.methods.network import Network
from dino.models import VisionTransformer, ViTSpec
from dino.training.checkpoint import Checkpoints
from dino.training.muon import COEFFICIENTS, orthogonal
from dino.training.optimizer import build_optimizer, set_rates, step_unless
from dino.training.settings import load

MATRICES = {
    f"backbone.blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}
RATES = [(0.1, 0.3), (0.05, 0.2), (0.01, 0.4), (0.02, 0.0)]


def network(seed: int = 0, ffn: str = "mlp") -> Network:
    torch.manual_seed(seed)
    spec = ViTSpec(16, 2, 2, 4, 8, registers=2, layer_scale=1e-5, ffn=ffn)
    return Network(VisionTransformer(spec), DINOHead(16, 12, 2, 24, 8))


def give_gradients(module: Network, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def by_singular_values(matrix: Tensor) -> Tensor:
    """Five times the polynomial of each singular value, in fp64; left and right singular vectors stay."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left * values @ right


class TestOrthogonal:
    @pytest.mark.parametrize("shape", [(4, 12, 12), (2, 36, 12), (3, 12, 48), (1, 1, 5)])
    def test_equals_its_definition_by_singular_values(self, shape):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = torch.stack([by_singular_values(matrix) for matrix in matrices])
        torch.testing.assert_close(orthogonal(matrices).double(), expected, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    def test_directions_are_kept_and_their_sizes_made_equal(self, scale):
        matrices = scale * torch.randn(5, 24, 72, generator=torch.Generator().manual_seed(1))
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        inside = left.mT @ orthogonal(matrices) @ right.mT
        singular = inside.diagonal(dim1=1, dim2=2)
        assert 0.6 < singular.min() < singular.max() < 1.3
        assert (inside - singular.diag_embed()).abs().max() < 1e-3

    def test_nothing_comes_of_nothing(self):
        assert not orthogonal(torch.zeros(2, 3, 4)).any()


class TestStep:
    @pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
    def test_matrices_of_blocks_follow_the_definition_and_the_rest_torchs_adamw(self, ffn):
        """Nesterov momentum of 0.95, 0.2·√max(rows, columns), decay by rate times decay; rates change."""
        ours, twin = network(ffn=ffn), network(ffn=ffn)
        optimizer = build_optimizer(ours, OptimConfig(name="muon", betas=[0.8, 0.95]))
        rest = build_optimizer(twin, OptimConfig(betas=[0.8, 0.95]))
        weights = {
            name: p.detach().double() for name, p in twin.named_parameters() if ".blocks." in name and p.ndim == 2
        }
        buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        assert weights.keys() == MATRICES or ffn == "swiglu"
        for seed, (lr, decay) in enumerate(RATES):
            gradients = give_gradients(ours, seed)
            give_gradients(twin, seed)
            for each in (optimizer, rest):
                set_rates(each, lr, decay)
                step_unless(each, torch.tensor(False))
            for name, weight in weights.items():
                gradient = gradients[name].double()
                buffers[name] = 0.95 * buffers[name] + 0.05 * gradient
                update = by_singular_values(0.95 * buffers[name] + 0.05 * gradient)
                weights[name] = (1 - lr * decay) * weight - lr * 0.2 * max(weight.shape) ** 0.5 * update
        for (name, parameter), expected in zip(ours.named_parameters(), twin.parameters(), strict=True):
            if name in weights:
                torch.testing.assert_close(parameter.double(), weights[name], rtol=0, atol=1e-4)
            else:
                assert torch.equal(parameter, expected), name

    def test_is_torchs(self):
        """Whose iterations run in bf16."""
        ours, twin = network(), network()
        optimizer = build_optimizer(ours, OptimConfig(name="muon"))
        of_twin = [p for name, p in twin.named_parameters() if name in MATRICES]
        theirs = torch.optim.Muon(of_twin, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        before = {name: p.detach().clone() for name, p in ours.named_parameters()}
        for seed, (lr, decay) in enumerate(RATES):
            give_gradients(ours, seed)
            give_gradients(twin, seed)
            set_rates(optimizer, lr, decay)
            theirs.param_groups[0].update(lr=lr, weight_decay=decay)
            optimizer.step()
            theirs.step()
        for (name, parameter), expected in zip(ours.named_parameters(), twin.parameters(), strict=True):
            if name in MATRICES:
                moved, wanted = parameter - before[name], expected - before[name]
                assert (moved - wanted).norm() < 0.02 * wanted.norm()

    def test_layers_have_their_rates(self):
        """Equal shapes go through together, each with the rate of its own block."""
        steps = []
        for layer_decay in (1.0, 0.5):
            module = network()
            optimizer = build_optimizer(module, OptimConfig(name="muon", layer_decay=layer_decay))
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            give_gradients(module, 0)
            set_rates(optimizer, 0.1, 0.0)
            optimizer.step()
            steps.append({name: p.detach() - before[name] for name, p in module.named_parameters()})
        for name in MATRICES:
            factor = 0.5 if ".blocks.1." in name else 0.25
            torch.testing.assert_close(steps[1][name], steps[0][name] * factor, rtol=1e-3, atol=1e-6)

    def test_blocks_go_through_together_and_the_host_does_not_wait(self):
        """Two products for each of five iterations and four shapes, however many blocks there are."""
        run, fine = Run(), torch.tensor(False)
        run.step(0)
        give_gradients(run.module, 1)
        with Counted() as counted:
            step_unless(run.optimizer, fine)
        assert counted.by_name["baddbmm"] == 2 * 5 * 4
        assert (counted.syncs, counted.copies) == (0, 0)

    def test_what_has_no_gradient_stays(self):
        module = network()
        module.backbone.blocks[0].attn.qkv.weight.requires_grad_(False)
        optimizer = build_optimizer(module, OptimConfig(name="muon"))
        set_rates(optimizer, 0.1, 0.3)
        give_gradients(module, 0)
        module.backbone.blocks[1].mlp.zero_grad()
        before = copy.deepcopy(module.state_dict())
        optimizer.step()
        still = {name for name, value in module.state_dict().items() if torch.equal(value, before[name])}
        of_mlp = {f"backbone.blocks.1.mlp.{name}" for name in dict(module.backbone.blocks[1].mlp.named_parameters())}
        assert still == of_mlp | {"backbone.blocks.0.attn.qkv.weight", "head.last_layer.weight_g"}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0], ids=["nan", "inf", "only the loss"])
    @pytest.mark.parametrize("pattern", [(True, False, False), (False, True, True, False)], ids=["first", "later"])
    def test_broken_steps_are_as_if_never_taken(self, pattern, bad):
        run, twin = Run(), Run()
        for seed, broken in enumerate(pattern):
            run.step(seed, broken, bad)
            if not broken:
                twin.step(seed, False, bad)
        assert differing(run.state(), twin.state()) == set()


class Run:
    """A network with its optimizer."""

    def __init__(self, seed: int = 0):
        self.module = network(seed)
        self.optimizer = build_optimizer(self.module, OptimConfig(name="muon", layer_decay=0.9))

    def step(self, seed: int, broken: bool = False, bad: float = 0.0) -> None:
        give_gradients(self.module, seed)
        if broken and bad:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad[0] = bad
        set_rates(self.optimizer, *RATES[seed % len(RATES)])
        step_unless(self.optimizer, torch.tensor(broken))
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"{index}.{key}": value for index, values in moments.items() for key, value in values.items()}
        return {name: value.clone() for name, value in (tensors | self.module.state_dict()).items()}


def test_a_checkpoint_gives_it_back_bit_by_bit(accelerator, tmp_path):
    run, other = Run(), Run(seed=1)
    saved, loaded = (Checkpoints(tmp_path, accelerator, {"student": r.module}, r.optimizer, 1) for r in (run, other))
    for seed in range(3):
        run.step(seed)
    path = saved.save(3, {})
    other.step(7)
    loaded.load(path)
    assert differing(other.state(), run.state()) == set()
    for seed in range(3, 6):
        run.step(seed)
        other.step(seed)
    assert differing(other.state(), run.state()) == set()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.fsdp=true"], "works with optim.name=adamw, not muon .each process holds a share"),
        (["model.arch=resnet18"], "which model.arch=resnet18 has not"),
    ],
)
def test_where_it_cannot_work_is_told(settings, said):
    with pytest.raises(UserError, match=said):
        load(None, ["optim.name=muon", *settings])
