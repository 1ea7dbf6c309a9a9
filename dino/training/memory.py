"""How much memory a step takes, told before it is taken: counted on a few images, for the whole micro-batch."""

import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dino.config.schema import TrainConfig
from dino.errors import UserError
from dino.methods import Batch
from dino.training.step import Step


class Estimate(NamedTuple):
    """Bytes on this process's device.

    Attributes:
        in_use: before the first step: program, networks, resident images.
        state: gradients and the optimizer's moments, which the first step adds; on a CPU a copy of the moments besides,
            from which a checkpoint is written.
        fixed: what is kept for the backward pass however many images there are.
        of_image: what is kept for the backward pass of each image of a micro-batch.
        images: of a micro-batch.
        free: still to be had.
    """

    in_use: int
    state: int
    fixed: int
    of_image: int
    images: int
    free: int

    def needed(self, images: int) -> int:
        """With micro-batches of so many images, beyond what is in use."""
        return self.state + self.fixed + images * self.of_image

    def text(self) -> str:
        """For the terminal."""
        return (
            f"about {gigabytes(self.in_use + self.needed(self.images))}: {gigabytes(self.in_use)} in use, "
            f"{gigabytes(self.state)} gradients and moments, {gigabytes(self.fixed + self.images * self.of_image)} "
            f"activations of {self.images} images; {gigabytes(self.in_use + self.free)} can be had"
        )

    def check(self, train: TrainConfig, processes: int) -> None:
        """Refuse what does not fit.

        Raises:
            UserError: with the settings that would make it fit.
        """
        if self.needed(self.images) <= self.free:
            return
        ways = ["smaller views", "a smaller model"]
        if not train.activation_checkpointing:
            ways.insert(0, "train.activation_checkpointing=true")
        for accumulation in range(train.accumulation + 1, train.batch_size // processes + 1):
            images, rest = divmod(train.batch_size // processes, accumulation)
            if rest == 0 and self.needed(images) <= self.free:
                needs = gigabytes(self.in_use + self.needed(images))
                ways.insert(0, f"train.accumulation={accumulation} (the same batch in smaller parts; {needs})")
                break
        raise UserError(f"the run does not fit into memory: {self.text()}. Ways on: {', '.join(ways)}")


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass: each storage once, parameters not at all."""

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__(self._keep, lambda tensor: tensor)
        self._storages = {parameter.untyped_storage().data_ptr(): 0 for parameter in parameters}

    def __enter__(self) -> Self:  # type: ignore[override]
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())


class Memory:
    """Estimates of a step's memory, and what was measured."""

    def __init__(self, take_step: Step):
        self.take_step, self.device = take_step, take_step.accelerator.device

    def estimate(self, micro_batches: list[list[Tensor]], step: int) -> Estimate:
        """What steps like this one need."""
        train = self.take_step.config.train
        images = train.batch_size // (self.take_step.accelerator.num_processes * train.accumulation)
        trainable = [tensor for tensor in self.take_step.method.student.parameters() if tensor.requires_grad]
        of_parameters = sum(tensor.numel() * tensor.element_size() for tensor in trainable)
        small, large = (2, 4) if images >= 4 else (0, images)
        kept = [self._kept(micro_batches[0], count, images, step) if count else 0 for count in (small, large)]
        of_image = (kept[1] - kept[0]) // (large - small)
        return Estimate(
            in_use=in_use(self.device),
            state=(5 if self.device.type == "cpu" else 3) * of_parameters,
            fixed=kept[1] - large * of_image,
            of_image=of_image,
            images=images,
            free=free(self.device),
        )

    def _kept(self, crops: list[Tensor], count: int, images: int, step: int) -> int:
        """Bytes that a forward pass of the first images of a micro-batch keeps for its backward pass."""
        method, device = self.take_step.method, self.device
        first = [crop.unflatten(0, (-1, images))[:, :count].flatten(0, 1).to(device) for crop in crops]
        batch = Batch([self.take_step.normalise(crop) for crop in first], range(count))
        exchanged, method.forward = method.forward, method.student  # there will be no gradients to exchange
        try:
            with Kept(method.student.parameters()) as kept, torch.compiler.set_stance("force_eager"):
                (target,) = method.targets([batch], step)
                losses = method.losses(batch, target)
        finally:
            method.forward = exchanged
        del losses  # held until here: an address that is freed would be another tensor's
        return kept.bytes


def most_in_use(device: torch.device) -> str:
    """The most that was in use so far, for the terminal."""
    if device.type == "cuda":
        return f"at most {gigabytes(torch.cuda.max_memory_allocated(device))} in use"
    return f"at most {gigabytes(_peak_of_process())} in use"


def in_use(device: torch.device) -> int:
    """Bytes of this process on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE
    return _peak_of_process()


def _peak_of_process() -> int:
    if sys.platform == "win32":
        return 0  # not told there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free(device: torch.device) -> int:
    """Bytes that this process can still have on the device: of the machine, or of the container, if that has fewer."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return sys.maxsize
    available = next(
        line for line in meminfo.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable")
    )
    amounts = [1024 * int(available.split()[1])]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text(encoding="utf-8").strip() != "max":
        amounts.append(int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return min(amounts)


def gigabytes(amount: int) -> str:
    """In the unit that people would use."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"
