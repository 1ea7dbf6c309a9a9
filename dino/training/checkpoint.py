"""Complete training state on disk: written aside, renamed when whole, the newest few kept.

checkpoints/step-00000500/student.safetensors      parameters and buffers; a file for each part of the method's state
                          teacher.safetensors
                          targets.safetensors      the center
                          optimizer.safetensors    moments, by parameter name
                          random-0.safetensors     random state, one file a process
                          state.json               step, scaler, data fingerprint

Tensors are whole, whether the run is sharded or not: a checkpoint opens with any number of processes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dino.errors import UserError
from dino.files import sync_folder
from dino.models.weights import load_strictly
from dino.run import whole_checkpoints
from dino.training.sharding import gathered, scattered

SAMPLING_WEIGHTS = "draws"  # the file of rebalancing's state, by the name it has always had


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: RUN/checkpoints.
        modules: what is saved by its state dict, by the name of its file; one of them is the student.
        optimizer: its state is saved under the names of the student's parameters.
        keep: how many of the newest are kept.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        keep: int,
    ):
        self.folder, self.accelerator, self.modules, self.keep = folder, accelerator, modules, keep
        self.optimizer = optimizer
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in modules["student"].named_parameters()}

    def save(self, step: int, facts: dict[str, Any]) -> Path:
        """Write the state after `step` optimizer steps; every process calls this.

        Args:
            facts: what else `load` should give back; JSON values.

        Raises:
            UserError: the disk is full or cannot be written; checkpoints before this one stay whole.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".step-{step:08d}.partial"
        failure = ""
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            failure = error.strerror or str(error)
        self.accelerator.wait_for_everyone()
        # Every process must take part in gathering, even where the folder could not be made.
        contents = {name: self._gathered(module.state_dict()) for name, module in self.modules.items()}
        contents["optimizer"] = self._gathered(self._optimizer_state())
        try:
            if not failure:
                self._write_own_part(partial, contents, {"step": step, **facts})
        except OSError as error:
            failure = error.strerror or str(error)
        self._agree_on_success(partial, step, failure)
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync_folder(self.folder)
            self._remove_old()
        self.accelerator.wait_for_everyone()
        return final

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return gathered(tensors, self.accelerator.is_main_process)

    def _write_own_part(self, partial: Path, contents: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """This process's files: its random state, and on the first process everything that all have in common."""
        _write(partial / f"random-{self.accelerator.process_index}.safetensors", _tensor_bytes(self._random_state()))
        if not self.accelerator.is_main_process:
            return
        for name, tensors in contents.items():
            _write(partial / f"{name}.safetensors", _tensor_bytes(tensors))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        _write(partial / "state.json", json.dumps({"scaler": scaler, **state}, indent=1, sort_keys=True).encode())

    def _agree_on_success(self, partial: Path, step: int, failure: str) -> None:
        """Raise a `UserError` in every process if one of them could not write."""
        failed = self.accelerator.gather(torch.tensor([int(bool(failure))], device=self.accelerator.device))
        if not int(failed.max()):
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        newest = self.newest()
        before = f"{newest} is whole" if newest else "there is no earlier one"
        raise UserError(
            f"the checkpoint of step {step} could not be written ({failure or 'by another process'}); {before}. "
            "Make room on the disk and start the same command again"
        )

    def _remove_old(self) -> None:
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            removed = old.with_name(f".{old.name}.removed")  # first out of sight: what is half removed is not whole
            old.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def load(self, path: Path) -> dict[str, Any]:
        """Put the state of a checkpoint back; returns the facts given to `save`, with `step`.

        Raises:
            UserError: damaged, or of a run with other networks.
        """
        weights_file = path / f"{SAMPLING_WEIGHTS}.safetensors"
        if SAMPLING_WEIGHTS in self.modules and path.is_dir() and not weights_file.exists():
            raise UserError(f"{path} is of a run that does not rebalance: set data.rebalance_every=0, as it did")
        try:
            state = json.loads((path / "state.json").read_text())
            for name, module in self.modules.items():
                tensors = scattered(load_file(path / f"{name}.safetensors"), module.state_dict())
                load_strictly(module, tensors, f"{path}/{name}.safetensors")
            self._load_optimizer(load_file(path / "optimizer.safetensors"))
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            random = path / f"random-{self.accelerator.process_index}.safetensors"
            if random.exists():  # absent for processes that the saved run did not have
                self._set_random_state(load_file(random))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint {path} is damaged ({error}): remove it to go on from the one before"
            ) from error
        return state

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

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        parameters = {name: parameter for parameter, name in self.names.items()}
        like = {name: parameters[name.rsplit("/", 1)[0]] for name, tensor in tensors.items() if tensor.ndim}
        for name, tensor in scattered(tensors, like).items():
            parameter, key = name.rsplit("/", 1)
            by_name.setdefault(parameter, {})[key] = tensor
        ordered = [self.names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = self.optimizer.state_dict()
        state["state"] = {index: by_name[name] for index, name in enumerate(ordered) if name in by_name}
        self.optimizer.load_state_dict(state)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.accelerator.device)


def _tensor_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
