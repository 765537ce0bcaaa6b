"""Runs Gluon kernels for sm90 on a CPU: Triton has no interpreter for Gluon.

Partitions of `warp_specialize` are threads of which one runs at a time; at every barrier the next
is drawn by chance, so that seeds try orders of events. Copies and products happen as late as the
barriers and waits of the kernel allow: a slot of shared memory that is given back too early shows
as a wrong result, a barrier that nobody completes as a deadlock. Layouts mean nothing here.
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
import threading
from collections import deque
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

GLUON = "triton.experimental.gluon"
UNFENCED = "tensor cores read what stores may not have reached"


class Deadlock(RuntimeError):
    """Every partition waits."""


class Scheduler:
    """Runs threads one at a time; the next one is drawn among those that can go on."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.current = threading.local()
        # Before the partitions start four warps run, which are one of them later.
        self.current.warps, self.current.unfenced = 4, set()
        self.pending: list = []  # copies in flight
        self.stores: list = []  # of the lone warp, which not all of its threads may have made

    def run(self, tasks, num_warps) -> None:
        assert not self.current.unfenced, UNFENCED
        self.turn = threading.Condition()
        self.waiting = {i: lambda: True for i in range(len(tasks))}
        self.error, self.running = None, None
        threads = [
            threading.Thread(target=self._task, args=(i, *task, warps))
            for i, (task, warps) in enumerate(zip(tasks, num_warps, strict=True))
        ]
        for thread in threads:
            thread.start()
        with self.turn:
            self._next()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _task(self, i, function, arguments, warps):
        self.current.id, self.current.warps, self.current.products = i, warps, deque()
        self.current.unfenced = set()
        try:
            with self.turn:
                self._await_turn()
            function(*arguments)
            assert not self.current.products, "a product was never waited for"
        except BaseException as error:
            self.error = self.error or error
        with self.turn:
            self.waiting.pop(i, None)
            self._next()

    def wait(self, ready) -> None:
        """Hand over, and go on once `ready()`."""
        with self.turn:
            self.waiting[self.current.id] = ready
            self._next()
            self._await_turn()

    def _await_turn(self):
        self.turn.wait_for(lambda: self.running == self.current.id or self.error is not None)
        if self.error is not None:
            raise Deadlock("another partition failed")

    def _next(self):
        able = []
        while not able:
            able = [i for i, ready in self.waiting.items() if ready()]
            # Copies land as late as can be, and now and then before that.
            if self.pending and (not able or self.random.random() < 0.2):
                self.pending.pop(self.random.randrange(len(self.pending)))()
            elif not able:
                break
        if not able and self.waiting and self.error is None:
            self.error = Deadlock(f"partitions {sorted(self.waiting)} wait for ever")
        self.running = self.random.choice(able) if able else None
        self.turn.notify_all()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have come."""

    def init(self, count):
        self.count = self.left = count
        self.bytes, self.phases = 0, 0

    def update(self, arrivals=0, expected=0):
        self.left -= arrivals
        self.bytes += expected
        assert self.left >= 0, "more arrivals than the barrier was made for"
        if self.left == 0 and self.bytes == 0:
            self.left, self.phases = self.count, self.phases + 1

    def passed(self, parity):
        return (self.phases - 1) & 1 == parity


class NamedBarrier:
    """`bar.sync` of 128 threads each, two of which fill it."""

    def __init__(self):
        self.arrived, self.generation = 0, 0

    def arrive(self):
        self.arrived += 1
        if self.arrived == 2:
            self.arrived, self.generation = 0, self.generation + 1


class Value(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self):
        return SimpleNamespace(layout=Layout())

    def split(self):
        return self.unbind(-1)

    def to(self, dtype, bitcast=False):
        return self.contiguous().view(dtype) if bitcast else super().to(dtype)


def _halves(x) -> torch.Tensor:
    """The two float16 of each int32."""
    return torch.as_tensor(x)[..., None].contiguous().view(torch.float16)


def _low_bytes(halves) -> Value:
    """Those of four float16, the first one lowest, as an int32."""
    return value(halves.view(torch.int16).to(torch.uint8).view(torch.int32).squeeze(-1))


def value(x) -> Value:
    return torch.as_tensor(x).as_subclass(Value)


class Layout:
    """Any layout, and its parent."""

    def __init__(self, *args, **kwargs):
        pass

    @property
    def parent(self):
        return self

    @classmethod
    def get_default_for(cls, *args):
        return cls()


class Shared:
    """Shared memory: `data` is written in place, by a lone warp not before its next barrier."""

    def __init__(self, data, scheduler):
        self.data, self.shape, self.dtype = data, list(data.shape), data.dtype
        self.scheduler = scheduler

    def index(self, i):
        return Shared(self.data[int(i)], self.scheduler)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length), self.scheduler)

    def memory(self):
        """Which allocation this is a part of."""
        return self.data.untyped_storage().data_ptr()

    def permute(self, order):
        return Shared(self.data.permute(order), self.scheduler)

    def load(self, layout):
        return value(self.data.clone())

    def store(self, x):
        if self.scheduler.current.warps > 1:
            self.data.copy_(x)
            self.scheduler.current.unfenced.add(self.memory())
        else:
            self.scheduler.stores.append((self.data, x.clone()))


class Barriers:
    def __init__(self, count):
        self.items, self.shape = [Barrier() for _ in range(count)], [count, 1]

    def index(self, i):
        return self.items[int(i)]


class Pointer:
    """Element offsets into a tensor's storage."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data, torch.as_tensor(offset)
        self.dtype = SimpleNamespace(element_ty=data.dtype)

    def __add__(self, offset):
        return Pointer(self.data, self.offset + torch.as_tensor(offset))

    def __getitem__(self, index):
        return Pointer(self.data, self.offset[index])


class Product:
    """An asynchronous product, computed when it is waited for."""

    def __init__(self, a, b, out, use_out):
        self.operands, self.result = (a, b, out, use_out), None

    def finish(self):
        a, b, out, use_out = self.operands
        out = out.result if isinstance(out, Product) else out
        a, b = (x.data if isinstance(x, Shared) else x for x in (a, b))
        product = (a.float() @ b.float()).to(out.dtype)
        self.result = value(out + product if use_out else product)


class Descriptor:
    """What the copy engine knows of a tensor."""

    def __init__(self, base, shape, strides, block_shape, layout):
        assert shape == list(base.shape) and len(block_shape) == len(shape) == len(strides)
        self.base, self.block_shape, self.dtype = base, block_shape, base.dtype
        nbytes = math.prod(block_shape) * base.itemsize
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def tile(self, place):
        """A tile that begins at `place`, zeros beyond the end."""
        b, h, row, column = map(int, place)
        rows, columns = self.block_shape[2:]
        part = self.base[b, h, row : row + rows, column : column + columns]
        tile = part.new_zeros(rows, columns)
        tile[: part.shape[0], : part.shape[1]] = part
        return tile


class Emulator:
    """Stands in for `triton.experimental.gluon` and its language."""

    def __init__(self, seed: int):
        self.scheduler = Scheduler(seed)
        self.named: dict[int, NamedBarrier] = {}
        self.program = self.programs = 0
        self.language = self._language()
        self.hopper = SimpleNamespace(
            fence_async_shared=self._fence,
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: barrier.init(count),
                expect=self._expect,
                arrive=lambda barrier, count=1: barrier.update(count),
                wait=lambda barrier, phase: self.scheduler.wait(lambda: barrier.passed(phase)),
            ),
            tma=SimpleNamespace(async_load=self._copy),
            warpgroup_mma=self._multiply,
            warpgroup_mma_wait=self._wait_products,
        )

    def jit(self, function=None, **options):
        if function is None:
            return self.jit
        return Kernel(self, function)

    def _fence(self):
        self.scheduler.current.unfenced.clear()

    def _expect(self, barrier, size):
        assert not self.scheduler.stores, "one thread announces what others may not have stored"
        barrier.update(1, size)

    def _barrier(self):
        while self.scheduler.stores:
            data, x = self.scheduler.stores.pop()
            data.copy_(x)

    def _copy(self, source, place, barrier, slot):
        tile = source.tile(place)

        def land():
            slot.data.copy_(tile)
            barrier.update(0, -tile.numel() * tile.element_size())

        self.scheduler.pending.append(land)

    def _multiply(self, a, b, out, *, use_acc=True, is_async=False):
        assert is_async
        read = {x.memory() for x in (a, b) if isinstance(x, Shared)}
        assert not read & self.scheduler.current.unfenced, UNFENCED
        product = Product(a, b, out, use_acc)
        self.scheduler.current.products.append(product)
        return product

    def _wait_products(self, outstanding, deps):
        queue = self.scheduler.current.products
        self.scheduler.wait(lambda: True)
        while len(queue) > outstanding:
            queue.popleft().finish()
        results = [product.result for product in deps]
        assert all(result is not None for result in results), "a product was not waited for"
        return results[0] if len(results) == 1 else results

    def _assemble(self, text, constraints, args, dtype, is_pure, pack):
        if "cvt.rn.relu.f16x2.f32" in text:
            return _low_bytes(torch.stack(args, -1).relu().half())
        if "fma.rn.relu" in text:
            *halves, factor, level = args
            factor, level = (_halves(x)[..., :1].double() for x in (factor, level))
            # In float64 nothing is rounded before the end, as in one instruction.
            return _low_bytes((torch.stack(halves, -1) * factor + level).relu().half())
        if "fma.rn" in text:
            *halves, factor, bias, other = args
            factor = _halves(factor)[0].double()
            return [value((x * factor + y).half()) for x, y in zip(halves, (bias, other))]
        if "max.f16x2" in text:
            pairs = [_halves(x) for x in args]
            if len(args) == 4:
                pairs = [torch.stack(args[:2], -1), torch.stack(args[2:], -1)]
            return value(torch.maximum(*pairs).view(torch.int32).squeeze(-1))
        if "add.rn.f32" in text:
            return (args[0] * args[1]).round().to(dtype)
        if "cvt.f32.f16" in text:
            return value(_halves(args[0]).amax(-1).float())
        if text.startswith("mov.b32") and pack == 4:
            # Four numbers of a register, which is there four times.
            registers = args[0].unflatten(-1, (-1, 4))
            assert (registers == registers[..., :1]).all()
            codes = registers[..., 0].contiguous()
            return value(codes.view(dtype))
        (number,) = re.match(r"bar\.sync (\d+), 256;", text).groups()
        assert self.scheduler.current.warps == 4
        barrier = self.named.setdefault(int(number), NamedBarrier())
        generation = barrier.generation
        barrier.arrive()
        self.scheduler.wait(lambda: barrier.generation != generation)

    def _allocate(self, dtype, shape, layout):
        if layout == "barriers":
            return Barriers(shape[0])
        # What nobody has written is NaN, or a number that makes no sense.
        whole = not dtype.is_floating_point
        unwritten = max(-(2**30), torch.iinfo(dtype).min) if whole else float("nan")
        return Shared(torch.full(shape, unwritten, dtype=dtype), self.scheduler)

    def _specialize(self, tasks, num_warps, registers):
        self.named.clear()
        self.scheduler.run(tasks, [4, *num_warps])
        assert not any(barrier.arrived for barrier in self.named.values()), "a barrier is half full"
        assert not self.scheduler.pending, "a copy was never waited for"

    def _load(self, pointer, mask=True, other=0):
        mask, offset = torch.broadcast_tensors(torch.as_tensor(mask), pointer.offset)
        inside = torch.where(mask, offset, 0)
        return value(torch.where(mask, pointer.data[inside], other))

    def _add(self, pointer, x, sem):
        before = self._load(pointer)
        pointer.data[pointer.offset] += x
        return before

    def _store(self, pointer, x, mask):
        mask, offset, x = torch.broadcast_tensors(mask, pointer.offset, x)
        pointer.data[offset[mask]] = x[mask].to(pointer.data.dtype)

    def _language(self):
        def where(condition, a, b):
            return value(torch.where(*map(torch.as_tensor, (condition, a, b))))

        return SimpleNamespace(
            constexpr=lambda x: x, static_range=range, int8=torch.int8, int16=torch.int16,
            int32=torch.int32, int64=torch.int64, float32=torch.float32,
            bfloat16=torch.bfloat16, float16=torch.float16, float8e4nv=torch.float8_e4m3fn,
            NVMMASharedLayout=Layout, NVMMADistributedLayout=Layout, SliceLayout=Layout,
            SwizzledSharedLayout=Layout, DotOperandLayout=Layout, BlockedLayout=Layout,
            DistributedLinearLayout=Layout,
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs,
            num_warps=lambda: self.scheduler.current.warps, barrier=self._barrier,
            allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            inline_asm_elementwise=self._assemble, load=self._load, store=self._store,
            atomic_add=self._add,
            arange=lambda start, end, layout: value(torch.arange(start, end)),
            full=lambda shape, x, dtype, layout: value(torch.as_tensor(x).expand(shape).to(dtype)),
            zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
            convert_layout=lambda x, layout, assert_trivial=False: x, where=where,
            join=lambda a, b: value(torch.stack([a, b], -1)),
            maximum=lambda a, b: value(torch.maximum(*map(torch.as_tensor, (a, b)))),
            minimum=lambda a, b: value(torch.minimum(*map(torch.as_tensor, (a, b)))),
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            exp2=lambda x: torch.exp2(torch.as_tensor(x)), log2=torch.log2, abs=torch.abs,
            div_rn=lambda a, b: torch.as_tensor(a) / b,
        )


class Kernel:
    """A jitted function: a call within a kernel, or a launch."""

    def __init__(self, emulator, function):
        self.emulator, self.function = emulator, function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg, enable_fp_fusion, **constants):
            assert num_warps == 4
            args = [self._argument(x) for x in args]
            self.emulator.programs = grid[0]
            for self.emulator.program in range(grid[0]):
                self.function(*args, **constants)

        return launch

    @staticmethod
    def _argument(x):
        if isinstance(x, torch.Tensor):
            assert x.storage_offset() == 0
            return Pointer(torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,)))
        return value(x) if isinstance(x, int) else x


@contextmanager
def emulated(*names: str, seed: int = 0):
    """Fresh copies of the named modules, whose Gluon is the emulator; the last one is yielded."""
    emulator = Emulator(seed)
    fakes = {
        GLUON: dict(jit=emulator.jit, constexpr_function=lambda f: f, language=emulator.language),
        f"{GLUON}.language.nvidia.hopper": vars(emulator.hopper),
        f"{GLUON}.nvidia.hopper": dict(TensorDescriptor=Descriptor),
    }
    before = {name: sys.modules.get(name) for name in (*fakes, *names)}
    try:
        for name, content in fakes.items():
            module = ModuleType(name)
            vars(module).update(content)
            _install(name, module)
        for name in names:
            spec = importlib.util.find_spec(name)
            module = importlib.util.module_from_spec(spec)
            _install(name, module)
            spec.loader.exec_module(module)
        yield module
    finally:
        for name, module in before.items():
            _install(name, module)


def _install(name, module) -> None:
    """Make `name` mean this module, to `import name` and to `from parent import child`."""
    parent, _, child = name.rpartition(".")
    if module is None:
        sys.modules.pop(name, None)
        vars(sys.modules.get(parent, SimpleNamespace())).pop(child, None)
        return
    sys.modules[name] = module
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
