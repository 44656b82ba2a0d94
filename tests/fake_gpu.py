"""A GPU without hardware: it computes nothing, but shows what would fail or wait on a real one.

A tensor on it is one of PyTorch's FakeTensors: it has a device, a shape and a dtype, but no values. Tensors
on the CPU are real. An operation on both devices raises, as on a GPU. Whatever makes the host wait for a GPU
is listed, with the function of the repository that causes it. Gradients are zeros, because a backward pass
needs a real GPU. DDP, compilation and channels-last are left out.
"""

import traceback
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset import device_views
from util import process_groups

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# The host needs a number, or the size of a result, that only the GPU knows.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._unique2}


@contextmanager
def fake_gpu(processes=1):
    """Yield a FakeGPU; within the context, this process is rank 0 of `processes` that compute the same."""
    with ExitStack() as stack:
        for name, replacement in {
            # Autocast switches itself off without a GPU.
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda: True,
            "torch.cuda.get_device_properties": lambda device: SimpleNamespace(total_memory=2**40),
            "torch.cuda.get_device_capability": lambda device: (8, 0),
            "torch.accelerator.is_available": lambda: True,  # DataLoader pins memory
            "torch.load": without_fakes(torch.load),
            "torch.Tensor.backward": backward,
            "torch.autograd.grad": lambda loss, inputs, **how: [torch.zeros_like(p) for p in inputs],
            "util.dist_utils.dist_init": lambda *settings: GPU,
            "util.dist_utils.wrap_ddp": lambda module: module,  # DDP needs a real GPU
            "util.dist_utils.all_gather_object": lambda x: [x] * processes,
            "util.process_groups.all_gather_object": lambda x: [x] * processes,
        }.items():
            stack.enter_context(mock.patch(name, replacement))
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            stack.callback(process_groups._close_groups)
        device_views.constant.cache_clear()
        stack.callback(device_views.constant.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(FakeGPU())


class FakeGPU(TorchDispatchMode):
    """waits: (file:function, cause) of each. dtypes: those of convolutions."""

    def __init__(self):
        super().__init__()
        self.waits, self.dtypes = [], set()
        self.pinned = {}  # address -> storage in pinned memory, which stays allocated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = kwargs or {}, func.overloadpacket
        if op is aten.is_pinned:
            return self.is_pinned(args[0])
        if op is aten._pin_memory:
            return self.pin(args[0])
        if not any(map(is_on_gpu, tree_leaves((args, kwargs)))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if cause := self.cause_of_wait(op, args, kwargs):
            self.waits.append((caller(), cause))
        if op is aten.convolution:
            self.dtypes.add(args[0].dtype)
        # The host reads ones.
        if op is aten._local_scalar_dense:
            return 1.0 if args[0].is_floating_point() else 1
        if op is aten.copy_ and not is_on_gpu(args[0]):
            return args[0].fill_(1)
        out = func(*args, **kwargs)
        if isinstance(out, FakeTensor) and not is_on_gpu(out):
            with unset_fake_temporarily():
                return torch.ones(out.shape, dtype=out.dtype)
        return out

    def cause_of_wait(self, op, args, kwargs):
        """Return why the host waits for the GPU in this operation, or None."""
        if op in READS:
            return f"it reads the result of {op}"
        if op in (aten.index, aten.index_put, aten.index_put_):
            index = [i for i in args[1] if i is not None]
            return "an index on the CPU, or a mask" if not all(map(is_gpu_index, index)) else None
        if op is aten._to_copy:
            x, to, dtype = args[0], kwargs.get("device", args[0].device), kwargs.get("dtype", args[0].dtype)
        elif op is aten.copy_:
            x, to, dtype = args[1], args[0].device, args[0].dtype
        else:
            return None
        if is_on_gpu(x) == is_on_gpu(to):
            return None
        if is_on_gpu(x):
            return "a copy to the CPU"
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            return "a blocking copy to the GPU"
        # Otherwise the host makes a copy in pageable memory first.
        if not (self.is_pinned(x) and x.is_contiguous() and x.dtype == dtype):
            return "a copy to the GPU from memory that is not pinned"
        return None

    def pin(self, x):
        with unset_fake_temporarily():
            pinned = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x)
        self.pinned[pinned.untyped_storage().data_ptr()] = pinned.untyped_storage()
        return pinned

    def is_pinned(self, x):
        return not is_on_gpu(x) and x.untyped_storage().data_ptr() in self.pinned


def without_fakes(function):
    """`function`, which makes real tensors as it does without a fake GPU."""

    def call(*args, **how):
        with unset_fake_temporarily():
            return function(*args, **how)

    return call


def is_on_gpu(x):
    """Whether a tensor is on the GPU; for a device, whether it is the GPU."""
    device = x.device if isinstance(x, torch.Tensor) else x
    return isinstance(device, torch.device) and device.type == "cuda"


def is_gpu_index(x):
    return is_on_gpu(x) and x.dtype != torch.bool


def caller():
    """file:function of the innermost call outside of tests/."""
    for frame in reversed(traceback.extract_stack()):
        folder = frame.filename.removeprefix(f"{ROOT}/").partition("/")[0]
        if folder in ("models", "dataset", "util", "train_semi.py"):
            return f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.name}"
    return "?"


def backward(loss):
    """Give every parameter that `loss` depends on a gradient of zeros."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if (parameter := getattr(node, "variable", None)) is not None:
                parameter.grad = torch.zeros_like(parameter)
