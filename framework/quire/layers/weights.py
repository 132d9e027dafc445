"""Which checkpoint tensors a model expects, and where each goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.errors import UnsupportedModel

Take = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class _Slot:
    shape: tuple[int | None, ...]
    take: Take
    required: bool
    replaces: tuple[str, ...]


class WeightTable:
    """Checkpoint name -> what takes the tensor. Layers fill it when they are built."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._loaded: set[str] = set()
        self._endings: list[Callable[[], None]] = []

    def expect(
        self,
        name: str,
        shape: tuple[int | None, ...],
        take: Take,
        *,
        required: bool = True,
        replaces: Sequence[str] = (),
    ) -> None:
        """`take` gets the tensor of that name and shape (None: any size); it must not keep the tensor itself.

        `replaces`: names that are not missed once this one has been loaded.
        """
        if name in self._slots:
            raise AssertionError(f"two layers expect {name!r}")
        self._slots[name] = _Slot(shape, take, required, tuple(replaces))

    def load(self, name: str, tensor: Tensor) -> bool:
        """Hand a tensor over; False if nothing expects it. Raises UnsupportedModel for a wrong shape."""
        slot = self._slots.get(name)
        if slot is None:
            return False
        fits = len(slot.shape) == tensor.ndim and all(
            want is None or want == have for want, have in zip(slot.shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ["any" if size is None else size for size in slot.shape]
            raise UnsupportedModel(
                f"tensor {name!r} has shape {list(tensor.shape)}; config.json makes it {wanted}",
                remedy="config.json and the weights belong to different models",
            )
        slot.take(tensor)
        self._loaded |= {name, *slot.replaces}
        return True

    def at_end(self, ending: Callable[[], None]) -> None:
        """Have `ending` called when no more tensors come."""
        self._endings.append(ending)

    def finish(self) -> None:
        """No more tensors come."""
        for ending in self._endings:
            ending()
        self._endings.clear()

    def missing(self) -> list[str]:
        """Required names that have not been loaded."""
        return [name for name, slot in self._slots.items() if slot.required and name not in self._loaded]
