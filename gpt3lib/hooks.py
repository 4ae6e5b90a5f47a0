"""The few private names of torch that the dry run leans on, and a refusal of any
torch they were not tried with."""

# Made from book/l_torch_hooks.ipynb by tools/export.py; edit the chapter.
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from gpt3lib.files import Refusal

TRIED = ("2.13",)  # versions of torch, patches aside


class TorchError(Refusal, RuntimeError):
    """A torch that a part of the library was not tried with."""


def needs_torch(what: str) -> None:
    """Raise TorchError, at once, unless `what` was tried with this torch."""
    own = torch.__version__.split("+")[0]
    fine = own.rpartition(".")[0] in TRIED
    words = f"{what} was tried with torch {', '.join(TRIED)}; this is torch {own}"
    right = f"pip install 'torch=={TRIED[-1]}.*'"
    TorchError.unless(fine, f"{words}. To have the other one: {right}")


PRIVATE = {
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    "FakeTensor": "torch._subclasses.fake_tensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "ProcessGroup": "torch._C._distributed_c10d",
    "AsyncCollectiveTensor": "torch.distributed._functional_collectives",
    "ShardingPropagator": "torch.distributed.tensor._sharding_prop",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "tree_leaves": "torch.utils._pytree",
}
VOTES = ("_warmup_forward_vote", "_warmup_backward_result")  # of a PipelineStage


def private(name: str):
    """One of torch's own names. Raises TorchError when this torch has it no more."""
    try:
        return getattr(import_module(PRIVATE[name]), name)
    except (ImportError, AttributeError) as error:
        words = f"torch {torch.__version__} has no {name} in {PRIVATE[name]}"
        raise TorchError(f"{words}; gpt3lib.hooks must be mended") from error


@contextmanager
def fake_ranks(world: int, rank: int = 0) -> Iterator[None]:
    """Meanwhile this process is one rank of `world`; messages are counted as sent.

    Raises TorchError, also when a process group is there already.
    """
    needs_torch("A fake process group")
    words = "this process belongs to a process group already; leave it first"
    TorchError.unless(not dist.is_initialized(), words)
    store = private("FakeStore")()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_tensors():
    """Meanwhile tensors are made without numbers, of any size. Raises TorchError."""
    needs_torch("Tensors without numbers")
    return private("FakeTensorMode")(allow_non_fake_inputs=True)


class Yes:
    """The result of a vote: one."""

    def item(self) -> int:
        """The number 1."""
        return 1


@contextmanager
def no_votes() -> Iterator[None]:
    """Meanwhile a stage of a pipeline begins without asking the others."""
    from torch.distributed.pipelining import PipelineStage

    for name in VOTES:
        words = f"torch {torch.__version__} has no PipelineStage.{name}"
        TorchError.unless(hasattr(PipelineStage, name), words)
    agree = dict.fromkeys(VOTES, lambda *_, **__: Yes())
    with mock.patch.multiple(PipelineStage, **agree):
        yield


class Message(NamedTuple):
    """A message of a rank: which kind, in which group, how many bytes the whole has."""

    kind: str
    group: str
    bytes: int


OUR_WORDS = {  # what torch's operations are called -> what the book calls them
    "all_gather": "all-gather",
    "allgather": "all-gather",
    "_allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter": "reduce-scatter",
    "all_reduce": "all-reduce",
    "allreduce": "all-reduce",
    "send": "send",
    "recv": "receive",
    "broadcast": "broadcast",
    "all_to_all": "all-to-all",
    "alltoall": "all-to-all",
}


def group_of(arguments) -> str:
    """The name of the group that an operation's arguments tell."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return private("ProcessGroup").unbox(argument).group_name
            except RuntimeError:  # another object, such as the kind of a sum
                continue
    return next((a for a in reversed(arguments) if isinstance(a, str)), "")


def message_of(operation, arguments, result) -> Message | None:
    """What an operation sends, if it is one that does; waiting sends nothing."""
    if operation.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = operation._opname
    kind = next((k for start, k in OUR_WORDS.items() if name.startswith(start)), None)
    if kind is None:
        return None
    sides, leaves = [*arguments, result], private("tree_leaves")
    tensors = ([t for t in leaves(side) if torch.is_tensor(t)] for side in sides)
    size = max(sum(t.numel() * t.element_size() for t in side) for side in tensors)
    return Message(kind, group_of(arguments), size)


def share_sent(kind: str, n: int) -> float:
    """How often a rank of n sends the whole, when messages go round in a ring."""
    around = (n - 1) / n
    ways = {"all-reduce": 2 * around, "send": 1.0, "receive": 0.0, "broadcast": 1.0}
    return ways.get(kind, around)


@functools.cache
def wrappers() -> tuple[type, type]:
    """The classes of tensors that are spread over ranks, or still on their way."""
    from torch.distributed.tensor import DTensor

    return DTensor, private("AsyncCollectiveTensor")


def bare_tensors(tree) -> Iterator[torch.Tensor]:
    """The tensors in a nest of lists without wrappers; those on meta are left out."""
    spread, on_its_way = wrappers()
    for tensor in private("tree_leaves")(tree):
        if not torch.is_tensor(tensor):
            continue
        if isinstance(tensor, spread):
            tensor = tensor._local_tensor  # to_local() would be an operation of its own
        if isinstance(tensor, on_its_way):
            tensor = tensor.elem
        if not tensor.is_meta:
            yield tensor


@contextmanager
def hearing_resizes(tell) -> Iterator[None]:
    """Meanwhile tell(storage) is called after each change of a storage's size.

    FSDP gives the gathered weights' memory back so, and no operation of torch tells.
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(storage, size):
        resize(storage, size)
        tell(storage)

    with mock.patch.object(torch.UntypedStorage, "resize_", resize_and_tell):
        yield


@contextmanager
def while_trying_shapes(context) -> Iterator[None]:
    """Meanwhile torch enters `context` whenever it only tries out shapes of wholes."""
    propagator = private("ShardingPropagator")
    words = f"torch {torch.__version__} has no ShardingPropagator._fake_mode_lock"
    TorchError.unless(hasattr(propagator, "_fake_mode_lock"), words)
    with mock.patch.object(propagator, "_fake_mode_lock", context):
        yield
