"""What work asks of a device, counted anywhere: operators, copies between devices, waits of the host."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"}
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}  # as views, they start nothing


class Counted(TorchDispatchMode):
    """Counts what runs while it is entered, in the backward pass too.

    Attributes:
        by_name: calls of each operator, without views and what only takes memory.
        copies: from one device to another.
        syncs: operators for whose result the host must wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.copies = self.syncs = 0

    @property
    def operators(self) -> int:
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not func.is_view and name not in FREE and func.namespace == "aten":
            self.by_name[name] += 1
        self.syncs += name in SYNCS
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            self.copies += source.device != result.device
        return result
