"""torch's private names: each is looked up, and a torch that has moved is told by name."""

import inspect
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt3lib import hooks
from gpt3lib.hooks import PRIVATE, VOTES, TorchError, needs_torch

OWN = torch.__version__.split("+")[0]
tried = pytest.mark.skipif(
    OWN.rpartition(".")[0] not in hooks.TRIED, reason=f"the hooks were not tried with torch {OWN}"
)
MOVED = "torch has moved: mend book/l_torch_hooks.ipynb, then TRIED"


@tried
@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_torch_still_has_each_private_name(name):
    assert hooks.private(name) is not None, MOVED


@tried
def test_torch_still_has_the_attributes_that_have_no_module():
    from torch.distributed.pipelining import PipelineStage, schedules
    from torch.distributed.tensor import DTensor

    assert all(callable(getattr(PipelineStage, name, None)) for name in VOTES), MOVED
    asked = inspect.getsource(schedules)
    assert all(f".{name}(" in asked for name in VOTES) and "result.item() == 1" in asked, MOVED
    assert "_local_tensor" in DTensor.__slots__, MOVED
    assert hasattr(hooks.private("ShardingPropagator"), "_fake_mode_lock"), MOVED
    assert hasattr(torch.ones(1).untyped_storage(), "_cdata") and callable(torch.UntypedStorage.resize_), MOVED


def test_another_torch_is_refused_at_once_and_by_name():
    with mock.patch.object(torch, "__version__", f"{hooks.TRIED[-1]}.7+cu999"):
        needs_torch("The dry run")
    for other in ("1.13.1", "2.1.3", "2.130.0", "3.13.0+cpu"):
        with mock.patch.object(torch, "__version__", other):
            with pytest.raises(TorchError, match="The dry run was tried with torch .* pip install"):
                needs_torch("The dry run")
            with pytest.raises(TorchError), hooks.fake_ranks(4):
                pass
            with pytest.raises(TorchError):
                hooks.fake_tensors()
            assert not dist.is_initialized()


def test_a_name_that_is_gone_is_told():
    with mock.patch.dict(PRIVATE, FakeStore="torch.no_such_module", tree_leaves="torch.nn"):
        for name in ("FakeStore", "tree_leaves"):
            with pytest.raises(TorchError, match=f"has no {name} in torch.n"):
                hooks.private(name)


@tried
def test_one_process_is_any_rank_and_leaves_nothing_behind():
    for rank in (0, 1023):
        with hooks.fake_ranks(1024, rank):
            assert (dist.get_rank(), dist.get_world_size()) == (rank, 1024)
            with pytest.raises(TorchError, match="belongs to a process group already"), hooks.fake_ranks(2):
                pass
        assert not dist.is_initialized()


def heard(*calls):
    """The messages of some calls, on rank 0 of 4."""
    found = []

    class Listener(hooks.private("TorchDispatchMode")):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            result = operation(*arguments, **(named or {}))
            found.append(hooks.message_of(operation, arguments, result))
            return result

    with hooks.fake_ranks(4):
        name = dist.group.WORLD.group_name
        with Listener():
            for call in calls:
                call()
    return name, [message for message in found if message]


@tried
def test_messages_have_their_kind_their_group_and_the_bytes_of_the_whole():
    from torch.distributed import _functional_collectives as functional

    small, large = torch.ones(6), torch.ones(24)
    name, found = heard(
        lambda: dist.all_reduce(small),
        lambda: dist.all_gather_single(large, small),
        lambda: dist.reduce_scatter_single(small, large),
        lambda: dist.send(small, 1),
        lambda: dist.recv(small, 1),
        lambda: dist.broadcast(small, 0),
        lambda: functional.all_reduce(small, "sum", dist.group.WORLD).wait(),
        lambda: functional.all_gather_single(small, 0, dist.group.WORLD).wait(),
        lambda: functional.reduce_scatter_single(large, "sum", 0, dist.group.WORLD).wait(),
        lambda: small + 1,
        lambda: dist.barrier(),
    )
    told = [(message.kind, message.bytes) for message in found]
    three = [("all-reduce", 24), ("all-gather", 96), ("reduce-scatter", 96)]
    assert told == [*three, ("send", 24), ("receive", 24), ("broadcast", 24), *three]
    assert {message.group for message in found} == {name}


def test_a_ring_hands_on_all_pieces_but_one():
    ways = {"all-gather": 0.75, "all-reduce": 1.5, "receive": 0, "reduce-scatter": 0.75, "send": 1}
    assert {kind: hooks.share_sent(kind, 4) for kind in ways} == ways
    assert hooks.share_sent("all-reduce", 1) == 0


@tried
def test_bare_tensors_are_without_wrappers_and_none_is_on_meta():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x, gone = torch.ones(8), torch.ones(8, device="meta")
    found = [*hooks.bare_tensors([x, {"a": x[2:4]}, gone, 3, "x"])]
    assert [t.numel() for t in found] == [8, 2] and found[0] is x
    with hooks.fake_ranks(4):
        spread = distribute_tensor(x, init_device_mesh("cpu", (4,)), [Shard(0)])
        assert [type(t) for t in hooks.bare_tensors(spread)] == [torch.Tensor]
        assert [t.numel() for t in hooks.bare_tensors([spread])] == [2]


def test_resizes_are_heard_and_the_old_way_comes_back():
    old, told, x = torch.UntypedStorage.resize_, [], torch.ones(8)
    with pytest.raises(ZeroDivisionError), hooks.hearing_resizes(lambda storage: told.append(storage.nbytes())):
        x.untyped_storage().resize_(64)
        x.untyped_storage().resize_(0)
        raise ZeroDivisionError
    assert told == [64, 0] and torch.UntypedStorage.resize_ is old


@tried
def test_torch_enters_our_context_while_it_tries_shapes_out_and_only_then():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    seen, inside = [], [False]

    class Context:
        def __enter__(self):
            inside[0] = True

        def __exit__(self, *error):
            inside[0] = False

    class Listener(hooks.private("TorchDispatchMode")):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            if any(issubclass(kind, hooks.wrappers()) for kind in types):
                return NotImplemented
            shape = tuple(getattr(arguments[0], "shape", ()))
            seen.append((operation._opname, shape, inside[0]))
            return operation(*arguments, **(named or {}))

    with hooks.fake_ranks(4):
        mesh = init_device_mesh("cpu", (4,))
        with hooks.fake_tensors(), hooks.while_trying_shapes(Context()), Listener():
            DTensor.from_local(torch.ones(3, 5), mesh, [Shard(0)], run_check=False).cumsum(1)
    assert [(shape, away) for name, shape, away in seen if name == "cumsum"] == [((12, 5), True), ((3, 5), False)]


@tried
def test_a_stage_that_need_not_ask_says_yes_and_the_old_vote_comes_back():
    from torch.distributed.pipelining import PipelineStage

    old = [getattr(PipelineStage, name) for name in VOTES]
    with hooks.no_votes():
        assert [getattr(PipelineStage, name)(None).item() for name in VOTES] == [1, 1]
    assert [getattr(PipelineStage, name) for name in VOTES] == old
    gone = mock.patch.object(hooks, "VOTES", ("_a_new_way",))
    with gone, pytest.raises(TorchError, match="has no PipelineStage._a_new_way"), hooks.no_votes():
        pass


@tried
def test_fake_tensors_have_shapes_and_no_numbers():
    with hooks.fake_tensors():
        a = torch.empty(10**6, 10**6)
        assert (a @ a).shape == (10**6, 10**6) and isinstance(a, hooks.private("FakeTensor"))
