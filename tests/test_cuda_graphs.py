"""What only a real CUDA graph can show of graphed steps; without a GPU the same tests run on its emulation."""

import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from emulated_graph import Emulated
from small_engine import KEY, flat, private
from test_graphed import BATCH, CASES, EXAMPLES, network
from torch import nn

from adaclip.graphed import CudaGraphs, GraphedStep
from adaclip.noise import STREAM_GRADIENT, NoiseSource

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
Graphed = GraphedStep if GPU else Emulated
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def repeatable():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def made(model, optimizer_of, device=DEVICE, **options):
    model = model.to(device)
    return private(model, optimizer=optimizer_of(model.parameters()), classes=True, **options)


def sgd(params, lr=0.5):
    return torch.optim.SGD(params, lr=lr)


def one_layer(*before):
    return nn.Sequential(*before, nn.Flatten(), nn.Linear(36, 3, bias=False))


# On the CPU one is enough to see that this test works: test_graphed has them all.
@pytest.mark.parametrize("case", CASES if GPU else ["everything"])
def test_replays_equal_the_loop(case):
    ends = []
    for graphed in (False, True):
        make_optimizer, given = CASES[case]
        usual = {"n": EXAMPLES, "batch_size": BATCH, "pad_to": 10, "sigma": 0.8}
        _, model, optimizer, loader = made(network(), make_optimizer, **(usual | given()))
        step = Graphed(model, optimizer, nn.functional.cross_entropy)
        found = []
        while optimizer.releases < 12:
            for x, y in loader:
                if graphed:
                    loss = step(x, y)
                else:
                    x, y = x.to(DEVICE), y.to(DEVICE)
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x), y)
                    loss.backward()
                    optimizer.step()
                found.append(
                    (loss.detach(), flat(model), optimizer.sample_norms, optimizer.clipping.thresholds)
                )
                found[-1] = [t.clone().cpu() for t in found[-1]]
                if optimizer.releases == 12:
                    break
        ends.append(found)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_replay_releases_the_noise_of_its_own_number():
    """Without a gradient, what moves the parameter is the noise: that of (key, release, element)."""
    std, rate = 0.8 * 2.0 / BATCH, 0.5
    _, model, optimizer, loader = made(
        one_layer(), sgd, n=EXAMPLES, batch_size=BATCH, sigma=0.8, max_grad_norm=2.0, pad_to=EXAMPLES
    )
    weight = model[-1].weight
    step = Graphed(model, optimizer, lambda out, y: (out * 0.0).sum())
    source, before = NoiseSource(KEY), weight.detach().clone()
    for x, y in loader:
        step(x, y)
        number = optimizer.releases - 1
        noise = source.normal_(torch.empty(weight.numel()), number, STREAM_GRADIENT, std).view_as(weight)
        torch.testing.assert_close((before - weight).cpu(), rate * noise, rtol=1e-4, atol=1e-6)
        before = weight.detach().clone()
    assert optimizer.releases == len(loader) > 3


def test_a_step_on_another_stream_comes_after_the_one_before(monkeypatch):
    waits = []

    class Stream:
        def wait_stream(self, other):
            waits.append((self, other))

    _, model, optimizer, _ = made(network(), sgd)
    step = Graphed(model, optimizer, nn.functional.cross_entropy)
    first, second = Stream(), Stream()
    monkeypatch.setattr(step, "_device", torch.device("cuda", 0))
    for here in (first, first, second, second, first):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, here=here: here)
        step._follow()
    assert waits == [(second, first), (first, second)]


@needs_gpu
def test_streams_that_change_change_no_noise():
    ends = []
    for streams in (1, 2):
        places = [torch.cuda.Stream(DEVICE) for _ in range(streams)]
        _, model, optimizer, loader = made(one_layer(), sgd, n=EXAMPLES, batch_size=BATCH, pad_to=EXAMPLES)
        step, found = Graphed(model, optimizer, nn.functional.cross_entropy), []
        torch.cuda.synchronize()
        for i, (x, y) in enumerate(batch for _ in range(4) for batch in loader):
            with torch.cuda.stream(places[i % streams]):
                step(x, y)
                found.append(model[-1].weight.detach().clone())
        torch.cuda.synchronize()
        ends.append([t.cpu() for t in found])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_nothing_but_the_release_changes_the_parameters():
    """At rate 0 the rehearsals, the capture and the replays leave every bit."""
    _, model, optimizer, loader = made(network(), lambda p: sgd(p, 0.0), pad_to=40)
    before = flat(model)
    step = Graphed(model, optimizer, nn.functional.cross_entropy)
    for x, y in loader:
        step(x, y)
    assert torch.equal(flat(model), before)


def test_dropout_draws_anew_at_every_replay():
    _, model, optimizer, loader = made(
        one_layer(nn.Dropout(0.5)), lambda p: sgd(p, 0.0), batch_size=40, pad_to=40
    )
    step = Graphed(model, optimizer, nn.functional.cross_entropy)
    losses = []
    for _ in range(4):
        for x, y in loader:  # all of the data, every time
            losses.append(step(x, y).item())
    assert len(set(losses)) == len(losses) == 4


def test_a_capture_is_on_a_stream_of_its_device_and_leaves_other_threads_alone(monkeypatch):
    calls = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            calls.append(("wait", self, other))

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def capture(graph, **options):
        calls.append(options)
        yield

    @contextmanager
    def on(place):
        calls.append(("on", place))
        yield

    second = torch.device("cuda", 1)
    here = Stream(second)
    fakes = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "stream": on, "device": on}
    fakes |= {"current_stream": lambda device: here, "graph_pool_handle": lambda: "pool"}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = CudaGraphs(second)
    graphs.rehearse(lambda: calls.append("rehearsed"))
    (_, aside, _), (_, entered), _, (*_, waited) = calls
    assert aside is entered is waited is not here
    replays = [graphs.record(lambda: None) for _ in range(2)]
    options = [call for call in calls if isinstance(call, dict)]
    for given in options:
        assert given["stream"].device == second
        assert given["stream"] not in (aside, here)
        assert given["pool"] == "pool"
        assert given["capture_error_mode"] == "thread_local"
    # For one pool, one stream.
    assert options[0]["stream"] is options[1]["stream"]
    replays[0]()
    assert calls[-1] == "replay"


@needs_gpu
def test_a_thread_that_pins_memory_may_go_on():
    """A loader's, for one: in a capture of torch's usual mode its next allocation would fail, and the capture too."""
    _, model, optimizer, loader = made(network(), sgd, pad_to=40)
    step, over, failed = Graphed(model, optimizer, nn.functional.cross_entropy), threading.Event(), []

    def pin():
        held = []
        try:
            while not over.is_set():
                # Another size every time: each is an allocation.
                held.append(torch.empty(len(held) + 1, 1 << 12).pin_memory())
                if len(held) == 64:
                    held.clear()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for x, y in loader:
            step(x, y)
    finally:
        over.set()
        thread.join()
    torch.cuda.synchronize()
    assert not failed
    assert flat(model).isfinite().all()


@needs_gpu
def test_a_replay_waits_for_nothing():
    _, model, optimizer, loader = made(network(), sgd, pad_to=40)
    step = Graphed(model, optimizer, nn.functional.cross_entropy)
    batches = iter(loader)
    step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in batches:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.releases == len(loader)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("set_device", [False, True])
def test_a_second_gpu_captures_its_own_steps(set_device):
    ends = []
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        with torch.cuda.device(device) if set_device else nullcontext():
            _, model, optimizer, loader = made(network(), sgd, device=device, pad_to=40)
            step = Graphed(model, optimizer, nn.functional.cross_entropy)
            for x, y in loader:
                step(x, y)
            ends.append(flat(model).cpu())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0
