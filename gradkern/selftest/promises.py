"""What only a GPU can show: no waiting, streams, CUDA graphs, sizes beyond 32 bits, several devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import gradkern
from gradkern import ops
from gradkern.selftest import oracle
from gradkern.selftest.checks import SKIP, check_rows, random


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where one of its operations waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def stream() -> torch.cuda.Stream:
    """A new one."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def small_model(seed: int = 0) -> nn.Module:
    """A few layers on the GPU, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()


def with_gradients(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model, after a backward pass."""
    model(random(16, 32, dtype=torch.float32, device="cuda", seed=seed)).square().mean().backward()
    return model


def never_waits() -> str:
    """No public call waits for the GPU."""
    model = with_gradients(small_model())
    clipper = gradkern.Clipper(
        model, policy=gradkern.Chain(gradkern.GlobalNorm(1.0), gradkern.TensorNorm(0.5))
    )
    for warm in (False, True):  # the first calls allocate
        with no_waiting() if warm else contextlib.nullcontext():
            gradkern.measure(model)
            gradkern.clip_(model, 0.1)
            gradkern.clip_(model, clip_value=0.01, nonfinite="zero")
            gradkern.clip_grad_norm_(model.parameters(), 0.1)
            clipper()
    return "measure, clip_, clip_grad_norm_ and Clipper, sync-debug mode set to error"


def fresh_addresses() -> str:
    """Gradients that are new tensors on every step."""
    kept = []
    for step in range(30):
        grads = [random(5000 + index, dtype=torch.float32, device="cuda", seed=step) for index in range(20)]
        kept.append((grads, ops.measure(grads)[0]))
    for grads, rows in kept:
        check_rows(rows, grads)
    return "30 steps of new gradients, read only at the end"


def two_streams() -> str:
    """Calls that run at the same time do not disturb each other."""
    streams = [stream(), stream()]
    lists = [
        [random(200_003, dtype=torch.float32, device="cuda", seed=s) for s in (i, i + 5)] for i in range(2)
    ]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for one, grads, rows in zip(streams, lists, found, strict=True):
            with torch.cuda.stream(one):
                rows.append(ops.measure(grads)[0])
    torch.cuda.synchronize()
    for grads, all_rows in zip(lists, found, strict=True):
        check_rows(all_rows[0], grads)
        assert all(torch.equal(rows, all_rows[0]) for rows in all_rows), "a stream disturbed the other"
    return "50 calls on each at a time"


def whole_network_capture() -> str:
    """torch's recipe, as its documentation has it, with clipping in it; against the same steps uncaptured."""
    captured, eager, other = small_model(), small_model(), with_gradients(small_model(1))
    right = oracle.rows([p.grad for p in other.parameters() if p.grad is not None])[:, 0].sum().sqrt().item()
    batch = torch.zeros(16, 32, device="cuda")
    batches = [random(16, 32, dtype=torch.float32, device="cuda", seed=seed) for seed in range(100)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (captured, eager)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        model(data).square().mean().backward()
        norm = gradkern.clip_(model, 0.01).norm
        optimizer.step()
        return norm

    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(captured, optimizers[0], batches[0])
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(eager, optimizers[1], batches[0])
    optimizers[0].zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_norm = step(captured, optimizers[0], batch)
    for data in batches:
        batch.copy_(data)
        graph.replay()
        between = gradkern.measure(other)
        norm = step(eager, optimizers[1], data)
        torch.testing.assert_close(graph_norm, norm, rtol=1e-4, atol=0)  # cuBLAS may choose otherwise
        assert abs(between.norm.item() - right) <= 1e-6 * right, "an eager call between replays is wrong"
    for one, two in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    return "100 replays, with an eager measure of another model in between"


def compiled_with_graphs() -> str:
    """torch's own CUDA graphs, which are strict about who keeps memory of theirs."""
    grads = [random(5000, dtype=torch.float32, device="cuda", seed=seed) for seed in range(3)]
    if not ops.has_kernels(grads[0].device):
        return SKIP + "only the kernels have it"

    def total_of(grads: list[Tensor]) -> Tensor:
        total: Tensor = torch.ops.gradkern.measure([grad * 2 for grad in grads])[1]
        return total * 1.0

    wanted = total_of(grads)
    compiled = torch.compile(total_of, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.testing.assert_close(compiled(grads).clone(), wanted, rtol=1e-6, atol=0)
    return 'torch.compile(mode="reduce-overhead")'


def beyond_32_bits() -> str:
    """One tensor of more elements than 32 bits can count."""
    numel = (1 << 31) + 77
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        return SKIP + f"needs {3 * numel >> 30} GiB of free memory"
    grad = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    grad[-1], grad[-2], grad[-3] = torch.nan, 0, 3
    row = ops.measure([grad])[0][0].tolist()
    assert row[1:] == [3.0, 1, 0, 1], f"{row}"
    assert abs(row[0] - (numel - 3 + 9)) <= 2e-6 * numel, f"sum of squares {row[0]}"
    ops.apply_([grad], None, torch.tensor(0.5, dtype=torch.float64, device="cuda"), float("inf"), "keep")
    ends = torch.cat([grad[:2], grad[1 << 31 : (1 << 31) + 2], grad[-3:]]).tolist()
    assert ends[:6] == [0.5, 0.5, 0.5, 0.5, 1.5, 0.0], f"after halving: {ends}"
    return f"{numel} elements measured and written"


def several_devices() -> str:
    """A list on all GPUs and the CPU, joined on the first."""
    count = torch.cuda.device_count()
    if count < 2:
        return SKIP + "one GPU is visible"
    grads = [random(4000, dtype=torch.float32, device=f"cuda:{index}", seed=index) for index in range(count)]
    grads.append(random(10, dtype=torch.float32, device="cpu"))
    stats = gradkern.clip_grads_(grads, 1.0)
    assert torch.cuda.current_device() == 0, "the current device has changed"
    total = oracle.rows(grads)[:, 0].sum().sqrt().item()
    assert abs(total - 1) <= 1e-6, f"the norm after clipping is {total}"
    assert stats.norm.is_cuda, "the norm is not on a GPU"
    return f"{count} GPUs and the CPU in one list"


PROMISES: dict[str, Callable[[], str]] = {
    "never waits": never_waits,
    "fresh addresses": fresh_addresses,
    "two streams": two_streams,
    "whole-network capture": whole_network_capture,
    "compiled with CUDA graphs": compiled_with_graphs,
    "beyond 2^31 elements": beyond_32_bits,
    "several devices": several_devices,
}
