"""The processes of one run: which of them this is, and what they tell each other; prism_fast's torch.distributed.

In one process there is no process group, and everything here is the identity. Every rank holds the plan of the whole
batch and computes a part of it, so what is exchanged is small: responses, scores, and gradients, which are added.
Nothing is pickled: tensors travel as safetensors, everything else as JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import faulthandler
import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from prism_fast.records import DataError

BUCKET = 1 << 26  # numbers in one sum of gradients
# Who starts the processes -> names of rank, number of ranks, and rank on this machine.
LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


class Place(NamedTuple):
    """Where a process stands among those of its run."""

    rank: int
    world: int
    local_rank: int  # on its machine


ALONE = Place(0, 1, 0)
_store: Any = None  # where the processes of this one's group have met


def place(environ: Mapping[str, str]) -> Place:
    """What torchrun and launchers like it, or SLURM, say of this process. Raises DataError on half of it."""
    for names in LAUNCHERS:
        if names[0] not in environ:
            continue
        if names[0] == "SLURM_PROCID" and not ("MASTER_ADDR" in environ and "SLURM_LOCALID" in environ):
            continue  # a shell inside an allocation: torchrun is started from it, or one process
        values = [environ.get(name, "0" if name == "LOCAL_RANK" else "") for name in names]
        if not all(value.isdecimal() for value in values):
            raise DataError(f"{', '.join(names)} are {values}, expected three numbers; start with torchrun")
        found = Place(*map(int, values))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if found.world > 1 and missing:
            raise DataError(f"{names[0]} is set and {missing[0]} is not; start with torchrun, or unset {names[0]}")
        port = environ.get("MASTER_PORT", "")
        if found.world > 1 and not (port.isdecimal() and int(port) < 1 << 16):
            raise DataError(f"MASTER_PORT is {port!r}, expected a number below {1 << 16}; start with torchrun")
        if not 0 <= found.rank < found.world:
            raise DataError(f"{names[0]} = {found.rank} of {names[1]} = {found.world}; start with torchrun")
        return found
    return ALONE


@contextlib.contextmanager
def joined(*, timeout_minutes: float = 30.0, alone: bool = False) -> Iterator[Place]:
    """This process among those of its run, as its environment says; the process group lasts as long as the context.

    One process has no group, unless ``alone``: what shards models wants one. Where a wait takes longer than the
    timeout, the process prints every thread's stack and ends.
    """
    here = place(os.environ)
    if dist.is_initialized() or (here.world == 1 and not alone):
        yield here
        return
    global _store
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(own_gpu(here, torch.cuda.device_count()))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    try:
        with _quiet_failure():
            _store = dist.HashStore() if here.world == 1 else _meeting(here, timeout)
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=_store, rank=here.rank, world_size=here.world, timeout=timeout)
    except (RuntimeError, ValueError, OSError, dist.DistError) as error:
        reason = " ".join(str(error).split())[:200]
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        fix = "take another MASTER_PORT" if in_use else "check that all were started"
        raise DataError(
            f"rank {here.rank} of {here.world}: does not reach the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({reason}); {fix}"
        ) from error
    try:
        yield here
        dist.destroy_process_group()  # not after an error: others may wait in it
    finally:
        faulthandler.cancel_dump_traceback_later()


def own_gpu(here: Place, visible: int) -> int:
    """Which of the GPUs that this process sees is its own; if one, a launcher has chosen. Raises DataError."""
    if visible == 1:
        return 0
    if here.local_rank >= visible:
        raise DataError(
            f"rank {here.rank}: process {here.local_rank} of its machine, which has {visible} GPUs; "
            f"start at most {visible} processes a machine"
        )
    return here.local_rank


def _meeting(here: Place, timeout: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT where processes find each other: torchrun's, or else the first one's.

    That listens at the address that was given alone, where torch's own would at all of the machine's, and gloo's
    connections take the interface that leads there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listens = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    inside = os.environ.get("LOCAL_WORLD_SIZE") == str(here.world)
    options = {"master_listen_fd": _listening(host, port, inside)} if listens else {}
    store = dist.TCPStore(host, port, here.world, is_master=listens, timeout=timeout, **options)
    if interface := _interface(host, port, inside):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store


def _listening(host: str, port: int, inside: bool) -> int | None:
    """A socket that listens there and nowhere else; None where it would not be heard, as a name stands for an address
    of another machine (a service in front of this one), or only here for this one. ``inside``: all processes are.

    Raises OSError where the port is taken.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if not _means(str(address[0]), host, inside):
        return None
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return None
            raise
        found.listen(1024)
        return found.detach()


def _interface(host: str, port: int, inside: bool) -> str | None:
    """The name of the interface by which this machine reaches another; None where it has no IPv4 address there, or the
    name stands for an address that others do not know."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect((host, port))  # sends nothing
        except OSError:
            return None
        own = asked.getsockname()[0]
        for _, name in socket.if_nameindex() if _means(own, host, inside) else ():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # one without an address
                if socket.inet_ntoa(fcntl.ioctl(asked, 0x8915, request)[20:24]) == own:  # SIOCGIFADDR
                    return name
    return None


def _means(address: str, host: str, inside: bool) -> bool:
    """Whether others know a host by the same address: many machines call themselves 127.0.1.1, each of them."""
    if inside or host == "localhost" or not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    with contextlib.suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    return False


class Board:
    """What processes leave for each other to read at any time, beside their calls; where they met. One thread's.

    Every call raises ConnectionError where it is gone: with the first process, or its launcher.
    """

    def __init__(self, store: Any):
        self._store = dist.PrefixStore("board", store.clone())
        self._store.set_timeout(datetime.timedelta(seconds=20))

    def post(self, key: str, text: str) -> None:
        with self._there():
            self._store.set(key, text)

    def read(self, key: str) -> str | None:
        with self._there():
            return self._store.get(key).decode() if self._store.check([key]) else None

    def is_first(self, key: str) -> bool:
        """Whether nobody has asked this of ``key`` before."""
        with self._there():
            return self._store.add(key, 1) == 1

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            raise ConnectionError(str(error)) from error


def board() -> Board | None:
    """None in one process, and where others than `joined` have brought the processes together."""
    return None if world() == 1 or _store is None else Board(_store)


def is_lost(error: BaseException) -> bool:
    """Whether a call of all processes ended because another did not come, or is no more."""
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo/transport", "NCCL"))
    return said or isinstance(error, dist.DistError)


_called = 0


def calls() -> int:
    """How many calls of all processes this one has come to, those of a second thread aside."""
    return _called


def _count() -> None:
    global _called
    if _mine.group is None:
        _called += 1


@contextlib.contextmanager
def _quiet_failure() -> Iterator[None]:
    """What libraries write to stderr in this context is dropped where it raises: the exception says it too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
            os.lseek(held.fileno(), 0, os.SEEK_SET)
            os.write(kept, held.read())
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class _Mine(threading.local):
    group: Any = None  # that this thread's calls go through; None: the one of the run


_mine = _Mine()


def another_group(timeout_minutes: float) -> Any:
    """A group of the same processes for what a second thread tells, whose calls the first one's would get mixed up
    with; its tensors are on hosts. A call of all processes; None in one process."""
    if world() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))


@contextlib.contextmanager
def through(group: Any) -> Iterator[None]:
    """This thread's calls go through a group of `another_group`."""
    _mine.group = group
    try:
        yield
    finally:
        _mine.group = None


def alive(timeout_minutes: float) -> None:
    """Says that this process gets on: if it is not called again in time, every thread's stack is printed."""
    if dist.is_initialized():
        faulthandler.dump_traceback_later(60 * timeout_minutes, repeat=False)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def grouped() -> bool:
    """Whether there is a process group, if of one process."""
    return dist.is_initialized()


def add(*tensors: Tensor) -> None:
    """Sums each tensor over the processes, in place. All have the same shapes in the same order."""
    if world() > 1:
        _count()
        for tensor in tensors:
            dist.all_reduce(tensor, group=_mine.group)


def gather(value: Any) -> list[Any]:
    """Every process's value (JSON), by rank."""
    return [json.loads(part) for part in _gather(json.dumps(value).encode())] if world() > 1 else [value]


def from_first(value: Any) -> Any:
    """The value (JSON) of rank 0; the others' is not looked at."""
    return gather(value if is_first() else None)[0]


def merge(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All processes' tensors, on the host, by name; each name is one process's."""
    if world() == 1:
        return dict(tensors)
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    merged: dict[str, Tensor] = {}
    for number, part in enumerate(_gather(save_tensors(own))):
        theirs = load_tensors(part)
        if twice := merged.keys() & theirs.keys():
            raise ValueError(f"merge: {min(twice)} of rank {number} is another rank's too")
        merged |= theirs
    return merged


class Share:
    """What this process keeps of a sequence of whole tensors that are dealt to ``parts`` processes: copies on its host.

    All processes offer the same tensors in the same order, whether they keep any or not; each goes to the process that
    has the fewest bytes so far. ``file("model")`` names the file for this process's: model.safetensors, or
    model-00001-of-00002.safetensors.
    """

    def __init__(self, parts: int):
        self.parts, self.kept = parts, dict[str, Tensor]()
        self._bytes = [0] * parts

    def offer(self, name: str, tensor: Tensor) -> None:
        owner = self._bytes.index(min(self._bytes))
        self._bytes[owner] += tensor.numel() * tensor.element_size()
        if owner == rank():
            # A copy on the host already, as a run goes on changing what is saved beside it.
            self.kept[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def file(self, name: str) -> str:
        return f"{name}.safetensors" if self.parts == 1 else f"{name}-{rank() + 1:05d}-of-{self.parts:05d}.safetensors"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses with a DataError in this context, all do; the first one's is raised."""
    fault = None
    try:
        yield
    except DataError as error:
        if world() == 1:
            raise
        fault = str(error)
    faults = [text for text in gather(fault) if text is not None]
    if faults:
        raise DataError(faults[0])


def _gather(payload: bytes) -> list[bytes]:
    _count()
    sizes = torch.zeros(world(), dtype=torch.int64)
    sizes[rank()] = len(payload)
    dist.all_reduce(sizes, group=_mine.group)
    longest = int(sizes.max())
    own = torch.zeros(longest, dtype=torch.uint8)
    own[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(parts, own, group=_mine.group)
    return [part[:size].numpy().tobytes() for part, size in zip(parts, sizes.tolist())]


def add_gradients(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Sums gradients over the processes, in place, in at least fp32; one that no process has stays absent.

    ``like``: the parameters they are of. A few collectives whatever their number: which gradients there are, then
    buckets of them.
    """
    if world() == 1:
        return list(gradients)
    _count()
    there = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.int32)
    dist.all_reduce(there, group=_mine.group)
    shared = [i for i, count in enumerate(there.tolist()) if count]
    found: dict[int, Tensor] = {}
    for bucket in buckets([(i, like[i]) for i in shared]):
        wide = torch.promote_types(like[bucket[0]].dtype, torch.float32)
        for i in bucket:
            own = gradients[i]
            found[i] = torch.zeros_like(like[i], dtype=wide) if own is None else own.to(wide)
        flat = torch.cat([found[i].flatten() for i in bucket])
        dist.all_reduce(flat, group=_mine.group)
        for i, total in zip(bucket, flat.split([found[i].numel() for i in bucket])):
            found[i].copy_(total.view_as(found[i]))
    return [found.get(i) for i in range(len(gradients))]


def buckets(numbered: Iterable[tuple[int, Tensor]]) -> Iterator[list[int]]:
    """Runs of tensors of one dtype, by number, of at most BUCKET elements where they are smaller than that."""
    bucket: list[int] = []
    size, dtype = 0, None
    for number, tensor in numbered:
        if bucket and (size + tensor.numel() > BUCKET or tensor.dtype != dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(number)
        size, dtype = size + tensor.numel(), tensor.dtype
    if bucket:
        yield bucket


def shard(module: nn.Module, units: tuple[type, ...], *, compute: torch.dtype) -> None:
    """Shards a module's fp32 weights by torch's FSDP2: each of ``units`` in one piece, then what is left, the root's.

    ``compute``: the dtype of gathered weights, and of a forward; gradients are summed in fp32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(module.parameters()).device.type
    options: dict[str, Any] = {"mesh": init_device_mesh(device, (world(),))}
    if compute != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for part in [m for m in module.modules() if isinstance(m, units)]:
        fully_shard(part, **options)
    fully_shard(module, **options)


def whole(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor of which this process holds a shard: a collective; another tensor as it is.

    ``like``: the parameter, where the tensor is what is held of something of its shape, without knowing it.
    """
    if like is not None and hasattr(like, "full_tensor") and not hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import DTensor

        assert isinstance(like, DTensor)
        tensor = DTensor.from_local(
            tensor.to(like.device),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, dealt as ``like`` is; the whole where ``like`` is no shard."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
