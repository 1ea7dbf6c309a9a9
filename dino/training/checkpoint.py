"""Complete training state on disk: written aside, renamed when whole, the newest few kept.

checkpoints/step-00000500/student.safetensors      parameters and buffers; a file for each part of the method's state
                          teacher.safetensors
                          targets.safetensors      the center
                          optimizer.safetensors    moments, by parameter name
                          random-0.safetensors     random state, one file a process
                          health-0.safetensors     what the monitor has seen, one file a process
                          state.json               step, scaler, data fingerprint; digests of all files

Tensors are whole, whether the run is sharded or not: a checkpoint opens with any number of processes.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dino.errors import UserError
from dino.files import remove, sync_folder, way_out
from dino.models.weights import load_strictly
from dino.run import whole_checkpoints
from dino.seal import FILES, STATE, Damaged, digest, file_digest, sealed, verified
from dino.training.sharding import gathered, scattered

logger = logging.getLogger(__name__)
SAMPLING_WEIGHTS = "draws"  # the file of rebalancing's state, by the name it has always had


class Stateful(Protocol):
    """Something of which each process has its own."""

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: RUN/checkpoints.
        modules: what is saved by its state dict, by the name of its file; one of them is the student.
        optimizer: its state is saved under the names of the student's parameters.
        keep: how many of the newest are kept.
        own: what each process has of its own besides its random state, by the name of its files.

    Attributes:
        descriptions: what the files of some modules say of their backbones, as `dino.models.weights.describe` has it.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        keep: int,
        own: Mapping[str, Stateful] | None = None,
    ):
        self.folder, self.accelerator, self.modules, self.keep = folder, accelerator, modules, keep
        self.optimizer = optimizer
        self.descriptions: dict[str, dict[str, str]] = {}
        self.own: dict[str, Stateful] = {"random": RandomState(accelerator.device), **(own or {})}
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in modules["student"].named_parameters()}

    def save(self, step: int, facts: dict[str, Any], folder: Path | None = None) -> Path:
        """Write the state after `step` optimizer steps; every process calls this.

        Args:
            facts: what else `load` should give back; JSON values.
            folder: where, if not among the run's own.

        Raises:
            UserError: the disk is full or cannot be written; checkpoints before this one stay whole.
        """
        folder = folder or self.folder
        final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
        failure: OSError | None = None
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            failure = error
        self.accelerator.wait_for_everyone()
        # Every process must take part in gathering, even where the folder could not be made.
        contents = {name: self._gathered(module.state_dict()) for name, module in self.modules.items()}
        contents["optimizer"] = self._gathered(self._optimizer_state())
        digests: dict[str, str] = {}
        try:
            if not failure:
                digests = self._write_tensors(partial, contents)
        except OSError as error:
            failure = error
        self._agree_on_success(partial, step, failure)
        try:
            if self.accelerator.is_main_process:
                self._seal(partial, digests, {"step": step, **facts})
                if os.path.lexists(final):
                    remove(final)
                partial.rename(final)
                sync_folder(folder)
        except OSError as error:
            failure = error
        self._agree_on_success(partial, step, failure)
        if self.accelerator.is_main_process:
            self._remove_old()
        self.accelerator.wait_for_everyone()
        return final

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return gathered(tensors, self.accelerator.is_main_process)

    def _write_tensors(self, partial: Path, contents: dict[str, dict[str, Tensor]]) -> dict[str, str]:
        """What this process has of its own, and on the first process what all have in common; digests by file."""
        process = self.accelerator.process_index
        files = {f"{name}-{process}": own.state() for name, own in self.own.items()}
        if self.accelerator.is_main_process:
            files |= contents
        digests = {}
        for name, tensors in files.items():
            content = _tensor_bytes(tensors, self.descriptions.get(name))
            digests[f"{name}.safetensors"] = digest(content)
            _write(partial / f"{name}.safetensors", content)
        return digests

    def _seal(self, partial: Path, digests: dict[str, str], state: dict[str, Any]) -> None:
        """state.json, the last file, with digests of this process's files and of the others' small ones."""
        for process in range(1, self.accelerator.num_processes):
            for name in self.own:
                digests[f"{name}-{process}.safetensors"] = file_digest(partial / f"{name}-{process}.safetensors")
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        _write(partial / STATE, sealed({"scaler": scaler, **state}, digests))

    def _agree_on_success(self, partial: Path, step: int, failure: OSError | None) -> None:
        """Raise a `UserError` in every process if one of them could not write."""
        failures = [error for error in gather_object([failure]) if error is not None]
        if not failures:
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        error, newest = failures[0], self.newest()
        before = f"{newest} is whole" if newest else "there is no earlier one"
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error.strerror or error}); {before}: "
            f"{way_out(error)} and start the same command again"
        )

    def _remove_old(self) -> None:
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            removed = old.with_name(f".{old.name}.removed")  # first out of sight: what is half removed is not whole
            try:
                old.rename(removed)
                remove(removed)
            except OSError as error:  # a reason to tell, none to end the run
                logger.warning("%s is no longer needed and cannot be removed (%s)", old, error.strerror or error)

    def load(self, path: Path) -> dict[str, Any]:
        """Put the state of a checkpoint back; returns the facts given to `save`, with `step`.

        Raises:
            Damaged: not as it was written.
            UserError: of a run with other networks.
        """
        state = verified(path)
        if SAMPLING_WEIGHTS in self.modules and not (path / f"{SAMPLING_WEIGHTS}.safetensors").exists():
            raise UserError(f"{path} is of a run that does not rebalance: set data.rebalance_every=0, as it did")
        try:
            for name, module in self.modules.items():
                tensors = scattered(_read(path, name, state), module.state_dict())
                load_strictly(module, tensors, f"{path}/{name}.safetensors")
            self._load_optimizer(path, _read(path, "optimizer", state), state)
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self._load_own(path, state)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise Damaged(path, str(error)) from error
        return state

    def _load_own(self, path: Path, state: dict[str, Any]) -> None:
        """This process's own state, and for a process that the saved run did not have that of the first.

        But no two shall draw the same random numbers: such a process keeps those that it was seeded with.
        """
        process = self.accelerator.process_index
        for name, own in self.own.items():
            file = f"{name}-{process}"
            if not _is_part(path, file, state) and name != "random":
                file = f"{name}-0"
            if _is_part(path, file, state):
                own.load_state(_read(path, file, state))
            elif file == "random-0":
                raise Damaged(path, f"{file}.safetensors is missing")

    def newest(self) -> Path | None:
        """The last whole checkpoint."""
        checkpoints = whole_checkpoints(self.folder)
        return checkpoints[-1] if checkpoints else None

    def _optimizer_state(self) -> dict[str, Tensor]:
        state = {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                state[f"{self.names[parameter]}/{key}"] = value
        return state

    def _load_optimizer(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        parameters = {name: parameter for parameter, name in self.names.items()}
        for name, tensor in tensors.items():
            parameter = parameters.get(name.rsplit("/", 1)[0])
            if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
                raise Damaged(path, f"optimizer.safetensors is of another network: it has {name} {list(tensor.shape)}")
        if not tensors and state["step"] and FILES not in state:
            raise Damaged(path, "optimizer.safetensors is empty")
        like = {name: parameters[name.rsplit("/", 1)[0]] for name, tensor in tensors.items() if tensor.ndim}
        for name, tensor in scattered(tensors, like).items():
            of_parameter, key = name.rsplit("/", 1)
            by_name.setdefault(of_parameter, {})[key] = tensor
        ordered = [self.names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        optimizer_state = self.optimizer.state_dict()
        optimizer_state["state"] = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
        self.optimizer.load_state_dict(optimizer_state)


class RandomState:
    """torch's random state of this process."""

    def __init__(self, device: torch.device):
        self.device = device

    def state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        try:
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], self.device)
        except RuntimeError as error:
            raise ValueError(f"no random state: {error}") from error


def _is_part(path: Path, name: str, state: dict[str, Any]) -> bool:
    """Whether a file belongs to the checkpoint; others may lie there, and are not read."""
    file = f"{name}.safetensors"
    return file in state[FILES] if FILES in state else (path / file).exists()


def _read(path: Path, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one of the checkpoint's files; raises `Damaged` where it has none of that name."""
    if not _is_part(path, name, state):
        raise Damaged(path, f"{name}.safetensors is missing")
    return load_file(path / f"{name}.safetensors")


def _tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
