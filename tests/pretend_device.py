"""A device that is none: its tensors lie on the CPU, and it is as strict as a GPU.

Operations do not take tensors of two devices, and NumPy takes none of this one's. What goes to the host or comes from
it is counted. Operations can be recorded and done again on the same memory, as a CUDA graph is, where nothing may ask
the device or bring it anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
MOVING = (torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default)
ASKING = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)  # how many there are
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # ask, too, by what is true
EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default)  # there is nothing to do again
PAST_PYTHON = ("empty.memory_format", "empty_strided", "_to_copy", "copy_", "detach")  # what makes them is not seen
SIZED_LATER = ("arange", "arange.start", "arange.start_step")  # of an empty tensor, whose size would stay what it was

transfers: list[str] = []  # operations that went from one device to the other, the oldest first
_recorded: list[Callable[[], None]] | None = None


class PretendTensor(Tensor):
    """A tensor on the device; `inner` is what lies on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def __repr__(self):
        return f"PretendTensor({self.inner})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"a tensor on {NAME} is none of NumPy's")


def _run(operation, args, kwargs):
    args, kwargs, target = list(args), dict(kwargs), None
    for place, argument in enumerate(operation._schema.arguments):
        if "Device" in str(argument.type):
            if kwargs.get(argument.name) is not None:
                target, kwargs[argument.name] = torch.device(kwargs[argument.name]).type, "cpu"
            elif place < len(args) and args[place] is not None:
                target, args[place] = torch.device(args[place]).type, "cpu"
    given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    there = [each for each in given if isinstance(each, PretendTensor)]
    here = [each for each in given if not isinstance(each, PretendTensor)]
    if there and operation not in MOVING and any(each.dim() for each in here):
        raise RuntimeError(f"{operation}: tensors on two devices")
    if operation in MOVING:
        target = NAME if isinstance(args[0], PretendTensor) else "cpu"
    is_there = target == NAME if target else bool(there)

    def compute():
        return operation(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    result = compute()
    is_asking = (
        operation in ASKING
        or (operation in INDEXING and any(each.dtype == torch.bool for each in there[1:]))
        or any(isinstance(each, (bool, int, float)) for each in tree_flatten(result)[0])
    )
    if (there and (not is_there or is_asking)) or (
        is_there and any(each.dim() or operation in MOVING for each in here)
    ):
        if _recorded is not None:
            raise RuntimeError(f"{operation}: not while operations are recorded")
        transfers.append(str(operation))
    if target == "cpu":
        return args[0] if operation in MOVING else tree_map(lambda each: each.clone(), result)
    if not is_there:
        return result
    known = {id(each.inner): each for each in there}
    # of a tensor that is not of inference mode, views are not either
    with torch.inference_mode(torch.is_inference_mode_enabled() and all(each.is_inference() for each in there)):
        wrapped = tree_map(lambda each: known[id(each)] if id(each) in known else _wrapped(each), result)
    if _recorded is not None and operation not in EMPTY:
        memory = {_memory(each) for each in there}
        made = [_memory(each) not in memory for each in tree_flatten(wrapped)[0]]

        def again():
            for old, new, is_made in zip(tree_flatten(wrapped)[0], tree_flatten(compute())[0], made, strict=True):
                if is_made:
                    old.inner.copy_(new)

        _recorded.append(again)
    return wrapped


def _inner(each):
    return each.inner if isinstance(each, PretendTensor) else each


def _wrapped(each):
    return PretendTensor(each) if isinstance(each, Tensor) else each


def _memory(each: PretendTensor) -> int:
    return each.inner.untyped_storage().data_ptr()


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """`leapasr.decoding.graphs.CudaGraphs` of this device."""
    with _recording() as operations:
        result = function()

    def launch() -> None:
        for operation in operations:
            operation()

    return launch, result


@contextmanager
def _recording() -> Iterator[list[Callable[[], None]]]:
    global _recorded
    _recorded = operations = []
    try:
        yield operations
    finally:
        _recorded = None


_setup_privateuseone_for_python_backend(NAME)
_kernels = torch.library.Library("aten", "IMPL")
for _name in PAST_PYTHON + SIZED_LATER:
    _packet, _, _overload = _name.partition(".")
    _operation = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
    _kernels.impl(_name, lambda *args, _of=_operation, **kwargs: _run(_of, args, kwargs), "PrivateUse1")
