"""Sharded networks on two real processes against whole ones: outputs, gradients, norms, averages, checkpoints."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from builders import assert_close
from torch.distributed.tensor import DTensor
from worlds import run

from dino.config.schema import OptimConfig, TrainConfig
from dino.errors import UserError
from dino.methods.ema import update_average
from dino.methods.heads import DINOHead
from dino.methods.masks import Masks
from dino.methods.network import Network
from dino.models import VisionTransformer, ViTSpec
from dino.training import launch
from dino.training.checkpoint import Checkpoints
from dino.training.optimizer import build_optimizer, clip_gradients, set_rates, step_unless
from dino.training.settings import load
from dino.training.sharding import gathered, is_sharded, scattered, whole_backbone

SPEC = ViTSpec(24, 3, 3, 4, 16, ffn="swiglu", layer_scale=0.1, registers=2, mask_token=True)
SPARSE = 5e-4  # Adam divides by the root of tiny moments: rounding shows there


def networks(rank: int, processes: int, **settings: bool) -> tuple[Network, Network]:
    """Student and teacher, sharded where there are several processes."""
    torch.manual_seed(0)
    made = [Network(VisionTransformer(SPEC), DINOHead(24, 11, 2, 20, 8), DINOHead(24, 7, 2, 20, 8)) for _ in range(2)]
    made[1].requires_grad_(False)
    method = SimpleNamespace(state=lambda: {"student": made[0], "teacher": made[1]})
    launch.place(accelerator(rank, processes), method, TrainConfig(fsdp=True, **settings))
    return made[0], made[1]


def accelerator(rank: int, processes: int) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=processes,
        process_index=rank,
        is_main_process=rank == 0,
        mixed_precision="no",
        scaler=None,
        wait_for_everyone=lambda: dist.barrier() if processes > 1 else None,
        gather=lambda tensor: tensor,
    )


def whole(network: Network) -> dict[str, torch.Tensor]:
    return gathered(network.state_dict(), keep=True)


def loss_of(network: Network, rank: int, processes: int) -> torch.Tensor:
    """Of this process's part of eight images, in two sizes, with every third patch of the first hidden."""
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(8, 3, side, side, generator=generator).chunk(processes)[rank] for side in (16, 8)]
    hidden = torch.zeros(len(crops[0]), 16, dtype=torch.bool)
    hidden[:, ::3] = True
    output = network(crops, Masks(hidden, hidden.flatten().nonzero()[:, 0], torch.ones(())), hide=True)
    return output.logits.square().mean() + output.patch_logits.square().mean()


def trained(rank: int, processes: int, **settings) -> dict:
    """Two steps (the second one broken) and a third, each clipped hard, with a moving average."""
    student, teacher = networks(rank, processes, **settings)
    optimizer = build_optimizer(student, OptimConfig())
    results: dict = {"sharded": is_sharded(student) and is_sharded(teacher), "norms": []}
    for step in range(3):
        loss_of(student, rank, processes).backward()
        if step == 0:
            named = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            results["gradients"] = gathered(named, keep=True)
        set_rates(optimizer, 1e-2, 0.1)
        results["norms"].append(clip_gradients(student.parameters(), 0.01, "parameter" if step else "global"))
        step_unless(optimizer, torch.tensor(step == 1))
        optimizer.zero_grad()
        update_average(teacher, student, 0.9)
    types = {type(tensor) for network in (student, teacher) for tensor in network.parameters()}
    types |= {type(moments["exp_avg"]) for moments in optimizer.state.values()}
    results |= {"types": {kind.__name__ for kind in types}, "student": whole(student), "teacher": whole(teacher)}
    if processes > 1:
        results["held"] = sum(parameter.to_local().numel() for parameter in student.parameters())
        results["all"] = sum(parameter.numel() for parameter in student.parameters())
    copy = whole_backbone(teacher, accelerator(rank, processes))
    results["backbone"] = {name: tensor.clone() for name, tensor in copy.state_dict().items()} if rank == 0 else {}
    return results


def recomputed(rank: int, processes: int) -> dict:
    return trained(rank, processes, activation_checkpointing=True)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {work: run(work, (1, 2), tmp_path_factory.mktemp("worlds")) for work in (trained, recomputed)}


@pytest.mark.parametrize("work", [trained, recomputed])
def test_two_processes_do_what_one_does(work, worlds):
    (alone,) = worlds[trained][1]
    for of_process in worlds[work][2]:
        torch.testing.assert_close(torch.stack(of_process["norms"]), torch.stack(alone["norms"]), rtol=1e-4, atol=0)
        for what, atol in (("gradients", 1e-6), ("student", SPARSE), ("teacher", SPARSE)):
            assert_close(of_process[what], alone[what], rtol=1e-4, atol=atol)


def test_every_parameter_and_moment_is_sharded(worlds):
    for of_process in worlds[trained][2]:
        assert of_process["sharded"]
        assert of_process["types"] == {DTensor.__name__}
    assert not worlds[trained][1][0]["sharded"]
    assert sum(of_process["held"] for of_process in worlds[trained][2]) == worlds[trained][2][0]["all"]
    assert max(of_process["held"] for of_process in worlds[trained][2]) < 0.6 * worlds[trained][2][0]["all"]


def test_the_first_process_gets_the_backbone_in_one_piece(worlds):
    first, second = worlds[trained][2]
    assert first["backbone"]
    assert not second["backbone"]
    for name, tensor in first["backbone"].items():
        assert torch.equal(tensor, first["teacher"][f"backbone.{name}"])


class Saved:
    """A state saved by some number of processes and loaded by another; module level, so that it reaches them."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank: int, processes: int) -> dict:
        student, teacher = networks(rank, processes)
        optimizer = build_optimizer(student, OptimConfig())
        modules = {"student": student, "teacher": teacher}
        checkpoints = Checkpoints(self.folder, accelerator(rank, processes), modules, optimizer, keep=9)
        newest = checkpoints.newest()
        start = checkpoints.load(newest)["step"] if newest else 0
        loss_of(student, rank, processes).backward()
        set_rates(optimizer, 1e-2, 0.1)
        optimizer.step()
        update_average(teacher, student, 0.9)
        checkpoints.save(start + 1, {})
        return {"step": start + 1, "student": whole(student), "teacher": whole(teacher)}


@pytest.mark.parametrize("order", [(2, 1, 2), (1, 2, 1)])
def test_a_checkpoint_opens_with_any_number_of_processes(order, tmp_path):
    """2 → 1 → 2 processes give what one process alone gives."""
    for turn, processes in enumerate(order):
        (tmp_path / f"turn{turn}").mkdir()
        changed = run(Saved(tmp_path / "changing"), (processes,), tmp_path / f"turn{turn}")[processes][0]
        (tmp_path / f"alone{turn}").mkdir()
        (alone,) = run(Saved(tmp_path / "alone"), (1,), tmp_path / f"alone{turn}")[1]
    assert changed["step"] == alone["step"] == 3
    for what in ("student", "teacher"):
        assert_close(changed[what], alone[what], rtol=1e-4, atol=SPARSE)
    assert len(list((tmp_path / "changing").glob("step-*"))) == 3


def test_scattering_and_gathering_are_inverse(tmp_path):
    for of_process in run(there_and_back, (2,), tmp_path)[2]:
        assert of_process


def there_and_back(rank: int, processes: int) -> bool:
    """Also for tensors with fewer rows than processes."""
    student, _ = networks(rank, processes)
    before = whole(student)
    other = {name: tensor + 1 for name, tensor in before.items()}
    student.load_state_dict(scattered(other, student.state_dict()))
    return all(torch.equal(tensor, other[name]) for name, tensor in whole(student).items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.arch=resnet18"], "train.fsdp shards transformer blocks"),
        (["optim.name=sgd"], "train.fsdp works with optim.name=adamw"),
    ],
)
def test_what_cannot_be_sharded_is_told(settings, said):
    with pytest.raises(UserError, match=said):
        load(None, ["train.fsdp=true", *settings])
