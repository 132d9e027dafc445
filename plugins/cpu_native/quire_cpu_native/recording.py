"""A step's work, noted while it runs once, and run again without what surrounds it: Python, modules, allocations.

What is noted are the operations of torch and the calls of this plugin's kernels, with the addresses that they had. All
memory that they made is kept, so that the addresses stay good; it holds activations alone, and recordings of which no
two run at once share it. Kernels that follow each other become one call, and take the place of operations that they
can do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from quire.plugin import HostArena
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quire_cpu_native.moves import move
from quire_cpu_native.native import LISTENER, CallFields, Kernel, Native

ATEN = torch.ops.aten
EMPTY = frozenset(
    {ATEN.empty, ATEN.empty_like, ATEN.empty_permuted, ATEN.empty_strided, ATEN.new_empty, ATEN.new_empty_strided}
)
"""Operations that give memory and write nothing into it."""
CHUNK = 16 << 20
"""Bytes that a workspace grows by, at least."""
ALIGNMENT = 64
READ_BY_HOST = frozenset({ATEN.resolve_conj, ATEN.resolve_neg})
"""What `Tensor.tolist` and `Tensor.numpy` leave to be seen when they hand values to the host."""


class Piece(Protocol):
    """A part of a recording."""

    def run(self) -> None:
        """Run it again."""


class Workspace:
    """Memory that a recording takes from the beginning on, whatever others have put there.

    What a step computes is forgotten at the next one, so that all recordings may lie in the memory of the largest.
    """

    def __init__(self) -> None:
        self._memory = HostArena()
        self._chunks: list[Tensor] = []
        self._place = self._used = 0  # the chunk to take from, and bytes of it that are taken

    @property
    def num_bytes(self) -> int:
        """Of all chunks."""
        return sum(len(chunk) for chunk in self._chunks)

    def rewind(self) -> None:
        """Begin anew."""
        self._place = self._used = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Room for a tensor of this dtype, shape and strides, with any content."""
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        room = self._take((last + 1) * tensor.element_size() if tensor.numel() else 0)
        return room.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def _take(self, num_bytes: int) -> Tensor:
        taken = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        while self._place < len(self._chunks) and self._used + taken > len(self._chunks[self._place]):
            self._place, self._used = self._place + 1, 0
        if self._place == len(self._chunks):
            self._chunks.append(self._memory.empty(max(taken, CHUNK)))
        begin, self._used = self._used, self._used + taken
        return self._chunks[self._place][begin : begin + num_bytes]


class Kernels:
    """Calls of kernels, which one call of the library runs in their order."""

    def __init__(self, library: Native) -> None:
        self._library = library
        self._calls: list[CallFields] = []
        self._held: list[Any] = []
        self._moves: list[Operation] = []
        self._failed = ctypes.c_int64(0)

    def note(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        """Add a call."""
        words = kernel.words(arguments)
        array = (ctypes.c_uint64 * len(words))(*words)
        self._calls.append(CallFields(kernel.recorded, kernel.library.pool, ctypes.addressof(array)))
        self._held += [kernel, array]

    def note_move(self, operation: Operation, named: dict[str, Any], result: Tensor) -> bool:
        """Add the call that does what the operation has done; False if no kernel can. `named`: all its arguments."""
        found = move(operation.function, named, result, ctypes.addressof(self._failed))
        if found is None:
            return False
        name, arguments = found
        self.note(self._library.function(name), arguments)
        self._moves.append(operation)
        return True

    @cached_property
    def _array(self) -> Any:
        return (CallFields * len(self._calls))(*self._calls)

    def run(self) -> None:
        self._library.replay(ctypes.addressof(self._array), len(self._calls))
        if self._failed.value:
            self._failed.value = 0
            for operation in self._moves:
                operation.run()  # one of them raises, and says why
            raise RuntimeError("rows of a step could not be moved")


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of torch. `results`: the tensors that it made, by their place among those that it returns."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[tuple[int, Tensor], ...]

    def run(self) -> None:
        made = list(_tensors(self.function(*self.arguments, **self.keywords)))
        for place, kept in self.results:
            kept.copy_(made[place])


@dataclass(frozen=True, slots=True)
class Recording:
    """Work that has been noted.

    Attributes:
        pieces: in their order. result: what the work returned, overwritten by each replay.
        made: tensors that the work has made. held: all that must live as long as this.
        is_native: whether kernels do it all, so that torch's modes do not matter.
    """

    pieces: tuple[Piece, ...]
    result: Tensor
    made: tuple[Tensor, ...]
    held: tuple[Any, ...]
    is_native: bool

    def replay(self) -> Tensor:
        """Run the work again; the result is the same tensor every time."""
        for piece in self.pieces:
            piece.run()
        return self.result

    def spoil(self) -> None:
        """Overwrite whatever the work has made, so that a replay cannot pass off old values for its own."""
        for tensor in self.made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is computed within it, by this thread.

    Args:
        workspace: gives the memory that is asked for without content.
        library: has kernels in place of some operations.

    Attributes:
        why_not: why what was noted is not the same calls on the same addresses every time; empty if it may be.
    """

    def __init__(self, workspace: Workspace, library: Native) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace, self._library = workspace, library
        self._pieces: list[Piece] = []
        self._open: Kernels | None = None  # the last piece, if kernels may still join it
        self._made: list[Tensor] = []
        self._held: list[Any] = []
        self.why_not = ""

    def run(self, work: Callable[[], Any]) -> Any:
        """Run the work, once, and return its result. Raises whatever it raises."""
        self._workspace.rewind()
        self._held += [self._workspace, work]  # and with it what it reads
        token = LISTENER.set(self._note_kernel)
        try:
            with self:
                result = work()
        finally:
            LISTENER.reset(token)
        if not isinstance(result, Tensor):
            self.why_not = self.why_not or f"it returns no tensor, but {type(result).__name__}"
        return result

    def recording(self, result: Tensor) -> Recording:
        """What was noted of the work that has returned this."""
        is_native = all(isinstance(piece, Kernels) for piece in self._pieces)
        return Recording(tuple(self._pieces), result, tuple(self._made), tuple(self._held), is_native)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: else torch imports its compiler, in order to keep it away from here, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        made = func(*args, **keywords)
        if func.overloadpacket in EMPTY and _is_plain(made):
            made = self._workspace.like(made)
            self._made.append(made)
            return made
        self.why_not = self.why_not or _why_not(func, args, made)
        if not self.why_not:
            self._note_operation(func, args, keywords, made)
        return made

    def _note_kernel(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        kernels = self._open or Kernels(self._library)
        kernels.note(kernel, arguments)
        self._append(kernels)

    def _append(self, piece: Kernels | Operation) -> None:
        if piece is not self._open:
            self._pieces.append(piece)
        self._open = piece if isinstance(piece, Kernels) else None

    def _note_operation(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> None:
        results = list(_tensors(made))
        given = {_memory(tensor) for tensor in _tensors((arguments, tuple(keywords.values())))}
        fresh = tuple((place, tensor) for place, tensor in enumerate(results) if _memory(tensor) not in given)
        self._held += results
        self._made += [tensor for _, tensor in fresh]
        if not (function._schema.is_mutable or fresh):  # a view
            return
        operation = Operation(function, arguments, keywords, fresh)
        names = (argument.name for argument in function._schema.arguments)
        named = dict(zip(names, arguments, strict=False)) | keywords
        kernels = self._open or Kernels(self._library)
        self._append(kernels if kernels.note_move(operation, named, results[0]) else operation)


def _why_not(function: Any, arguments: tuple[Any, ...], made: Any) -> str:
    """Why a step with this operation is not the same every time; empty if it may be."""
    tags = set(function.tags)
    returned = made if isinstance(made, (list, tuple)) else (made,)
    values = any(each is not None and not isinstance(each, Tensor) for each in returned)
    if values or function.overloadpacket in READ_BY_HOST or torch.Tag.data_dependent_output in tags:
        return f"the host reads a value ({function})"
    if any(tensor.layout is not torch.strided for tensor in _tensors(made)):
        return f"a tensor has no address ({function})"
    by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(arguments[1:2]))
    if torch.Tag.dynamic_output_shape in tags and (function.overloadpacket is not ATEN.index or by_mask):
        return f"a shape depends on values ({function})"
    if torch.Tag.inplace_view in tags and function.overloadpacket is not ATEN.detach_:
        return f"a tensor changes its shape ({function})"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    """Whether it lies in main memory as its strides say."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _memory(tensor: Tensor) -> int | None:
    """Address of the memory that it is a view of; None for weights that torch has packed, which have none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None
