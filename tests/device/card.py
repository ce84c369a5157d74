"""The device `card` of card.cpp, known to torch and Lightning; what runs on it is counted.

card.make()
with card.Counting() as counts:
    ...
counts.launches, counts.syncs
"""

import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from lightning.fabric.strategies import SingleDeviceStrategy as FabricSingleDevice
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import load

NAME = "card"
HERE = Path(__file__).parent
FREE = 2**30  # bytes that it says are free

# what gives the same memory, or none at all: no work for a card
VIEWS = {
    *("view", "as_strided", "t", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "expand"),
    *("detach", "alias", "split", "split_with_sizes", "unbind", "diagonal", "_reshape_alias", "_unsafe_view", "unfold"),
    *("lift_fresh", "chunk", "view_as", "set_", "resize_", "empty", "empty_strided", "empty_like", "new_empty"),
    *("new_empty_strided", "is_same_size", "_has_compatible_shallow_copy_type", "is_pinned", "_pin_memory"),
}
# what waits for its result, since Python or the shape of what follows depends on it
WAITS = {
    *("_local_scalar_dense", "_linalg_check_errors", "nonzero", "equal", "masked_select", "is_nonzero", "allclose"),
    *("_unique2", "unique_dim"),
}
# what may have operands on both sides: copies, and indices that are brought over
BOTH = {"copy_", "_to_copy", "_copy_from", "index", "index_put_", "index_put", "_index_put_impl_", "set_"}


class Counting(TorchDispatchMode):
    """While this lasts, what runs on the card is counted, and operands on both sides are refused.

    launches: operators that a card would run as a kernel of their own at least; by name
    syncs: times that the computer waits for the card; by the line of sparsekit that does
    to_card, from_card: copies, by that line; moved: their bytes
    double: operators with float64 on the card, by that line; refused where double is not allowed
    """

    def __init__(self, double: bool = True):
        super().__init__()
        self.allowed = double
        self.launches, self.syncs = Counter[str](), Counter[str]()
        self.to_card, self.from_card, self.double = Counter[str](), Counter[str](), Counter[str]()
        self.moved = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        name = func.overloadpacket.__name__
        if name not in BOTH and _on(given) and any(not on_card(x) and x.dim() for x in given):
            raise RuntimeError(f"{func}: operands on the card and not, at {_line()}: {[_told(x) for x in given]}")
        if not self.allowed and kwargs.get("dtype") == torch.float64 and _on(given):
            raise TypeError(f"{func}: the card has no float64, at {_line()}")
        out = func(*args, **kwargs)
        made = _tensors(out)
        if _on(given) or _on(made):
            self._count(name, args, given, made)
        return out

    def _count(self, name: str, args: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        line = _line()
        if any(x.dtype == torch.float64 for x in [*given, *made] if on_card(x)):
            if not self.allowed:
                raise TypeError(f"{name}: the card has no float64, at {line}")
            self.double[line] += 1
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], made[0]) if name == "_to_copy" else (args[1], args[0])
            if on_card(source) != on_card(target):
                (self.from_card if on_card(source) else self.to_card)[line] += 1
                self.moved += source.nbytes
                if on_card(source):
                    self.syncs[line] += 1
                return
        if name in WAITS or (name.strip("_").startswith("index") and any(x.dtype == torch.bool for x in given[1:])):
            self.syncs[line] += 1
        if name not in VIEWS and name != "_local_scalar_dense":
            self.launches[name] += 1


def on_card(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on it."""
    return tensor.device.type == NAME


def make() -> None:
    """Compile the device, unless it was, and make it known to torch and Lightning, in this process."""
    load(name="sparsekit_card", sources=[str(HERE / "card.cpp")], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    for registry in (AcceleratorRegistry, ACCELERATOR_REGISTRY):
        registry.register(NAME, Card, description="a device for tests")
    for strategy in (SingleDeviceStrategy, FabricSingleDevice):
        _let_go_to_the_card(strategy)


def _let_go_to_the_card(strategy: Any) -> None:
    """Lightning puts one device that it does not know on the CPU."""
    known = strategy.root_device.fget

    def root_device(self: Any) -> torch.device:
        return torch.device(NAME, 0) if isinstance(self.accelerator, Card) else known(self)

    strategy.root_device = property(root_device)


class Card(Accelerator):
    """For `trainer: {accelerator: card}`."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing."""

    def teardown(self) -> None:
        """Nothing."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """The one."""
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """The one."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """It is."""
        return True

    @staticmethod
    def name() -> str:
        """What a recipe calls it."""
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None."""
        return {}


def _module() -> types.ModuleType:
    """What torch asks a device's module for."""
    module = types.ModuleType(f"torch.{NAME}")

    class Device:
        def __init__(self, device: Any):
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    said: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "mem_get_info": lambda device=None: (FREE, FREE),
        "device": Device,
    }
    for name, each in said.items():
        setattr(module, name, each)
    return module


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _on(tensors: list[torch.Tensor]) -> bool:
    return any(on_card(tensor) for tensor in tensors)


def _told(tensor: torch.Tensor) -> str:
    return f"{tensor.device.type} {tuple(tensor.shape)}"


def _line() -> str:
    """The innermost line of sparsekit that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        _, found, place = frame.f_code.co_filename.rpartition("/sparsekit/")
        if found:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
