"""torch.compile before and after make_private: eager's numbers, one graph, and every check that eager mode has."""

import warnings

import pytest
import torch
import torch._inductor.lowering  # its decompositions look it up
from small_engine import data, flat, labeled, private, small_model, train_labeled
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

from adaclip.clipped_sum import ClippedSum
from adaclip.groups import LabelGroups
from adaclip.integrations.state import PrivacyState
from adaclip.layers import WSConv2d
from adaclip.models import build
from adaclip.smoothing import SmoothedLoss
from adaclip.testing import private_step, square_loss

# Inductor takes seconds a model, and differs from this one only below the graph.
FAST = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, backend=FAST, **options):
    return torch.compile(model, backend=backend, **options)


def by_itself(model, backend=FAST):
    model.compile(backend=backend)
    return model


def in_parts(model, backend=FAST):
    model[0], model[3] = compiled(model[0], backend), compiled(model[3], backend)
    return model


def run_before(model, backend=FAST):
    """Compiled, and called, when it was an ordinary model."""
    model = compiled(model, backend)
    square_loss(model(data(10)[0]), data(10)[1]).backward()
    model.zero_grad()
    return model


def graphs():
    return counters["stats"]["unique_graphs"]


def steps(model, optimizer, loader, epochs=1, forward=None):
    """Trains; returns the rows of every batch."""
    rows = []
    forward = model if forward is None else forward
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            square_loss(forward(x), y).backward()
            optimizer.step()
            rows.append(optimizer.batch.rows)
    return rows


@pytest.mark.parametrize(
    ("how", "backend"),
    [(compiled, FAST), (by_itself, FAST), (in_parts, FAST), (run_before, FAST), (compiled, "inductor")],
)
def test_before_and_after_make_private(backend, how):
    _, model, optimizer, loader = private()
    steps(model, optimizer, loader)
    first = how(small_model(), backend)
    _, given, optimizer, loader = private(first, optimizer=torch.optim.SGD(first.parameters(), lr=0.1))
    assert given is first
    steps(given, optimizer, loader)
    assert torch.allclose(flat(given), flat(model), atol=1e-6)
    if how is not run_before:
        _, later, optimizer, loader = private()
        steps(later, optimizer, loader, forward=how(later, backend))
        assert torch.allclose(flat(later), flat(model), atol=1e-6)
    assert not counters["graph_break"]


# Inductor would take a minute for all of VGG-11; bench/bench_compile.py checks that.
@pytest.mark.parametrize(
    ("name", "plan", "backend"), [("vgg11", None, FAST), ("vgg-mini", [8, "M", 8, 16, "M"], "inductor")]
)
def test_a_vgg_is_one_graph(name, plan, backend):
    x, y = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = build(name, num_classes=3, in_channels=1, width=8, image_size=28, plan=plan)
        forward = compiled(model, backend, fullgraph=True) if compile else model
        found.append(private_step(forward, x, y, nn.functional.cross_entropy, max_grad_norm=0.5))
    assert graphs() == 1
    assert not counters["graph_break"]
    (plain, norms), (ours, seen) = found
    assert float(norms.max()) > 0.5
    assert torch.allclose(seen, norms, rtol=1e-5)
    for name, total in plain.items():
        assert float((ours[f"_orig_mod.{name}"] - total).norm()) <= 1e-5 * float(total.norm())


def test_padded_batches_do_not_recompile():
    # A few examples and a low rate: some batches are empty.
    _, model, optimizer, loader = private(n=24, batch_size=2, pad_to="auto", max_batch_size=4)
    rows = steps(model, optimizer, loader, epochs=4, forward=compiled(model, fullgraph=True))
    assert min(rows) == 0 < max(rows)
    assert len(set(rows)) > 3
    assert graphs() == 1


def test_a_new_shape_recompiles_once():
    _, model, optimizer, loader = private(n=24, batch_size=2)
    rows = steps(model, optimizer, loader, epochs=4, forward=compiled(model, fullgraph=True))
    assert len(set(rows)) > 4
    # The first size; then sizes as symbols; 0 and 1, which torch keeps apart.
    assert graphs() <= 4


def test_training_and_evaluation_take_turns():
    _, model, optimizer, loader = private(pad_to="auto")
    forward = compiled(model, fullgraph=True)
    x, _ = data(4)
    for _ in range(3):
        steps(model, optimizer, loader, forward=forward.train())
        with torch.no_grad():
            found = forward.eval()(x)
        assert torch.allclose(found, model(x), atol=1e-6)
    assert graphs() == 2


def test_evaluation_in_the_middle_of_a_smoothed_batch_is_of_the_parameters():
    _, model, _, loader = private(smoothing=SmoothedLoss(tau=0.5, signal="always"))
    forward, x = compiled(model), data(4)[0]
    expected = model.eval()(x)
    for batch, _ in loader:
        model.train()
        forward(batch)
        assert not torch.allclose(model[0].weight, small_model()[0].weight)
        assert torch.equal(forward.eval()(x), expected)
        break


def test_evaluation_gradients_are_the_users():
    _, model, _, _ = private()
    forward = compiled(model, fullgraph=True).eval()
    x, y = data(4)
    square_loss(forward(x), y).backward()
    expected = small_model()
    square_loss(expected(x), y).backward()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_detach_gives_an_ordinary_model_back():
    first = compiled(small_model(), fullgraph=True)
    engine, model, optimizer, loader = private(first)
    steps(model, optimizer, loader)
    assert engine.detach(first) is first
    x, y = data(4)
    square_loss(first(x), y).backward()
    expected = small_model()
    expected.load_state_dict(first._orig_mod.state_dict())
    square_loss(expected(x), y).backward()
    for a, b in zip(first.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("saved", [lambda m: m, compiled, in_parts], ids=["plain", "compiled", "in parts"])
@pytest.mark.parametrize("loaded", [lambda m: m, compiled, in_parts], ids=["plain", "compiled", "in parts"])
def test_checkpoints_go_between_compiled_and_plain_models(tmp_path, saved, loaded):
    engine, model, optimizer, loader = private(saved(small_model()))
    steps(model, optimizer, loader)
    engine.save_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    assert all("_orig_mod" not in name for name in torch.load(tmp_path / "c.pt")["module"])
    engine, other, optimizer, loader = private(loaded(small_model()))
    engine.load_checkpoint(tmp_path / "c.pt", module=other, optimizer=optimizer)
    assert torch.equal(flat(other), flat(model))


def test_a_checkpoint_takes_either_name_of_the_model(tmp_path):
    engine, model, optimizer, loader = private()
    forward = compiled(model)
    steps(model, optimizer, loader, forward=forward)
    engine.save_checkpoint(tmp_path / "c.pt", module=forward, optimizer=optimizer)
    engine.load_checkpoint(tmp_path / "c.pt", module=model, optimizer=optimizer)
    with pytest.raises(ValueError, match="module and optimizer must be those"):
        engine.save_checkpoint(tmp_path / "c.pt", module=compiled(small_model()), optimizer=optimizer)


@pytest.mark.parametrize("form", [lambda m: m, compiled, in_parts], ids=["plain", "compiled", "in parts"])
def test_the_privacy_state_in_a_trainer_s_checkpoint_goes_on(form):
    engine, model, optimizer, loader = private(form(small_model()), clipping="adaptive", sigma=0.5)
    steps(model, optimizer, loader)
    state, releases = PrivacyState(engine).state_dict(), optimizer.releases
    engine, model, optimizer, loader = private(form(small_model()), clipping="adaptive", sigma=0.5)
    PrivacyState(engine).load_state_dict(state)
    assert len(engine.accountant) == optimizer.releases == releases > 0
    assert torch.equal(optimizer.clipping.thresholds, state["parts"]["clipping"]["state"]["thresholds"])


@pytest.mark.parametrize(
    "clipping",
    ["flat", "per_layer", "adaptive", "per_layer_adaptive", "automatic", "psac", "dc_sgd", "dc_sgd_error"],
)
def test_clipping_strategies_and_label_groups(clipping):
    found = []
    for compile in (False, True):
        _, model, optimizer, loader = labeled(clipping=clipping, groups=LabelGroups(groups=3), pad_to="auto")
        forward = compiled(model, fullgraph=True) if compile else model
        forward.train()
        train_labeled(forward, optimizer, loader, 3)
        found.append((flat(model), optimizer.clipping.thresholds))
    assert graphs() == 1
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Shared(nn.Module):
    """One convolution used twice, a frozen layer, and every other kind that has an adapter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = WSConv2d(1, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.norm = nn.GroupNorm(2, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.relu(self.norm(self.again(self.frozen(torch.tanh(self.again(x))))))
        tokens = torch.arange(5, device=x.device).expand(x.shape[0], 5)
        return self.head(self.layer_norm(x.flatten(2).mean(-1)) + self.table(tokens).mean(1))


def test_layers_used_twice_and_frozen_ones():
    found = []
    for compile in (False, True):
        model = Shared()
        trained = [p for p in model.parameters() if p.requires_grad]
        _, model, optimizer, loader = private(
            model, optimizer=torch.optim.SGD(trained, lr=0.1), pad_to="auto"
        )
        before = model.frozen.weight.clone()
        steps(
            model,
            optimizer,
            loader,
            forward=compiled(model, "inductor", fullgraph=True) if compile else model,
        )
        assert torch.equal(before, model.frozen.weight)
        found.append(flat(model))
    assert graphs() == 1
    assert torch.allclose(*found, atol=1e-6)


def test_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small_model()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    _, plain, optimizer, loader = private()
    steps(plain, optimizer, loader)
    for whole in (True, False):
        _, model, optimizer, loader = private(Checkpointed())
        if not whole:
            model.body = compiled(model.body)
        steps(model, optimizer, loader, forward=compiled(model) if whole else model)
        assert torch.allclose(flat(model), flat(plain), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    found = []
    for compile in (False, True):
        _, model, optimizer, loader = private(pad_to="auto")
        forward = compiled(model, fullgraph=True) if compile else model
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                out = forward(x)
            assert out.dtype == dtype
            square_loss(out.float(), y).backward()
            optimizer.step()
        found.append(flat(model))
    assert graphs() == 1
    assert torch.allclose(*found, atol=2e-3)


@pytest.mark.filterwarnings("ignore:adaclip has no fast")
def test_a_module_without_an_adapter():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3)
        )

    _, plain, optimizer, loader = private(model())
    steps(plain, optimizer, loader)
    _, other, optimizer, loader = private(model())
    steps(other, optimizer, loader, forward=compiled(other))
    assert torch.allclose(flat(other), flat(plain), atol=1e-6)


# --- what a loop may not do ------------------------------------------------------------------------------


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self):
        super().__init__()
        model = small_model()
        self.body, self.head = model[:3], model[3:]

    def forward(self, x):
        x = self.body(x)
        torch._dynamo.graph_break()
        return self.head(x)


class Regional(Broken):
    """Two compiled parts of an eager forward."""

    def __init__(self, backend=FAST):
        super().__init__()
        self.body, self.head = compiled(self.body, backend), compiled(self.head, backend)

    def forward(self, x):
        return self.head(self.body(x))


def loss(forward, x, y):
    return square_loss(forward(x), y)


def two_halves(f, x, y, seen):
    first, second = loss(f, x[:6], y[:6]), loss(f, x[6:], y[6:])
    second.backward()
    first.backward()


def twice(f, x, y, seen):
    once = loss(f, x[:6], y[:6])
    once.backward(retain_graph=True)
    once.backward()


def two_rows_of_a_sample(f, x, y, seen):
    (loss(f, x, y) + loss(f, x.flip(0), y)).backward()


def first_again(f, x, y, seen):
    first, second = loss(f, x[:4], y[:4]), loss(f, x[4:8], y[4:8])
    first.backward(retain_graph=True)
    second.backward()
    first.backward()


def that_of_the_batch_before(f, x, y, seen):
    if not seen:
        seen.append(loss(f, x, y))
        seen[0].backward(retain_graph=True)
    else:
        seen[0].backward()


WAYS = {
    "eager": (small_model, lambda m: m),
    "whole": (small_model, compiled),
    "before": (lambda: compiled(small_model()), lambda m: m),
    "in two graphs": (Broken, compiled),
    "regional": (Regional, lambda m: m),
    "inductor": (small_model, lambda m: compiled(m, "inductor")),
}


def attempt(way, body):
    make, how = WAYS[way]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, model, optimizer, loader = private(make(), n=24, batch_size=12, poisson_sampling=False, lr=0.0)
    forward, seen = how(model), []
    for x, y in loader:
        optimizer.zero_grad()
        body(forward, x, y, seen)
        optimizer.step()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_one_backward_for_each_of_several_forwards(way):
    attempt(way, two_halves)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [twice, first_again, that_of_the_batch_before])
def test_a_second_backward_over_a_forward_is_refused(way, body):
    # In compiled code torch sees it before we do, by the ticket that the first backward has used.
    with pytest.raises(RuntimeError, match=r"two backward passes over one forward|modified by an inplace"):
        attempt(way, body)


@pytest.mark.parametrize("way", WAYS)
def test_two_forwards_in_one_backward_are_refused(way):
    with pytest.raises(RuntimeError, match="one backward covers two forward passes"):
        attempt(way, two_rows_of_a_sample)


@pytest.mark.parametrize("how", [compiled, lambda m: m], ids=["compiled", "eager"])
def test_a_backward_compiled_as_a_whole_is_refused(how):
    engine, model, _, loader = private()
    for x, y in loader:
        total = square_loss(how(model)(x), y)
        with (
            compiled_autograd._enable(torch.compile(backend="eager")),
            pytest.raises(RuntimeError, match="compile the model alone"),
        ):
            total.backward()
        break
    assert len(engine.accountant) == 0


@pytest.mark.parametrize("way", ["whole", "in two graphs", "regional", "inductor"])
def test_uses_carry_the_number_of_their_forward_pass(way, monkeypatch):
    numbers = []
    real = ClippedSum._check_uses

    def check(self, used):
        numbers.append({use.forward for layer in used for use in layer.slot.uses})
        return real(self, used)

    monkeypatch.setattr(ClippedSum, "_check_uses", check)
    attempt(way, two_halves)
    assert numbers == [{2}, {1}, {4}, {3}]


def test_a_layer_called_alone_is_numbered_by_its_call():
    _, model, optimizer, loader = private(n=24, batch_size=12)
    part = compiled(model[0])
    for x, _ in loader:
        optimizer.zero_grad()
        square_loss(part(x), torch.ones(x.shape[0], 4 * 36)).backward()
        number = max(optimizer._sum._seen)
        assert number < 0
        break


def test_what_the_backward_computes_and_keeps():
    """No ordinary weight gradient, and no mask of a ReLU in place of its output."""
    found = []

    def look(graph, inputs):
        found.append(graph)
        return make_boxed_func(graph.forward)

    seen = aot_autograd(
        fw_compiler=look,
        bw_compiler=look,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.manual_seed(0)
    model = build("vgg11", num_classes=3, in_channels=1, width=8, image_size=28)
    _, model, _, _ = private(model, pad_to="auto")
    torch.compile(model, backend=seen, fullgraph=True)(torch.randn(4, 1, 28, 28)).sum().backward()
    forward, backward = found
    saved = next(n for n in forward.graph.nodes if n.op == "output").args[0]
    assert all(t.meta["val"].dtype != torch.bool for t in saved if hasattr(t, "meta"))
    convolutions = [n for n in backward.graph.nodes if "convolution_backward" in str(n.target)]
    # Not the first one's: images need no gradient.
    assert len(convolutions) == 7
    assert all(n.args[-1] == [True, False, False] for n in convolutions)
    results = next(n for n in backward.graph.nodes if n.op == "output").args[0]
    assert all(r is None for r in results)
