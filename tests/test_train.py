"""adaclip.train and its parts: schedule, views, average, evaluation, signals, and what a run releases when."""

import io
import json
import math
import signal
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from adaclip import evaluation, train
from adaclip.accounting import Event, Ledger, SubsampledGaussian
from adaclip.assembly import learning_rate, pick_device
from adaclip.augment import AUGMENTATIONS, augment
from adaclip.interrupts import Interrupts
from adaclip.plots import plot_run
from adaclip.progress import Bar, Lines, Silent, make_reporter
from adaclip.smoothing import moving_average
from adaclip.train import evaluate
from adaclip.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


# --- schedule ---------------------------------------------------------------------------------------------


def rates(total=10, **settings):
    config = TrainConfig(lr=2.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_learning_rates_follow_their_formula():
    assert rates() == [2.0] * 10
    assert rates(lr_schedule="linear") == pytest.approx([2 * (1 - t / 10) for t in range(10)])
    assert rates(lr_schedule="cosine") == pytest.approx([1 + math.cos(math.pi * t / 10) for t in range(10)])
    assert rates(warmup=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert all(rate > 0 for rate in rates(lr_schedule="linear", warmup=10))


# --- views ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_view_is_made_of_its_own_image_alone(kind):
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 16, 20)
    views = augment(images, kind, torch.Generator().manual_seed(0))
    assert views.dtype == torch.uint8
    assert torch.equal(views, images)


def test_views_are_shifts_and_flips():
    image = torch.arange(16 * 24, dtype=torch.float32).reshape(1, 1, 16, 24)
    generator = torch.Generator().manual_seed(0)
    flips = augment(image.expand(64, 1, 16, 24), "flip", generator)
    flipped = [torch.equal(v, image[0].flip(-1)) for v in flips]
    assert 10 < sum(flipped) < 54
    assert all(f or torch.equal(v, image[0]) for f, v in zip(flipped, flips, strict=True))
    shifts = augment(image.expand(64, 1, 16, 24), "shift", generator)
    offsets = set()
    for view in shifts:
        # Far from the edges a shifted view is the image, moved.
        dy, dx = divmod(int(view[0, 8, 12]) - int(image[0, 0, 8, 12]) + 3, 24)
        offsets.add((dy, dx - 3))
        assert torch.equal(view[:, 4:12, 6:18], image[0, :, 4 + dy : 12 + dy, 6 + dx - 3 : 18 + dx - 3])
    assert {dy for dy, _ in offsets} == set(range(-2, 3))
    assert {dx for _, dx in offsets} == set(range(-3, 4))


def test_unknown_views_are_refused():
    with pytest.raises(ValueError, match="kind must be one of none, shift"):
        augment(torch.zeros(1, 1, 4, 4), "rotate", torch.Generator())


# --- average, evaluation, device, signals -------------------------------------------------------------------


def test_the_average_forgets_the_start_and_then_decays():
    model = nn.Linear(1, 1, bias=False)
    average = moving_average(model, 0.5)
    expected = None
    for n, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0)):
        model.weight.data.fill_(value)
        average.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected)


def test_evaluation_is_exact_and_restores_the_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Dropout(0.9)).train()
    images = torch.randint(256, (1201, 1, 4, 4), dtype=torch.uint8)
    labels = torch.randint(4, (1201,))
    accuracy, loss = evaluate(model, images, labels, lambda x: x.float() / 255)
    assert model.training
    logits = model.eval()(images.float() / 255)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=1e-9)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is cuda, but torch finds no CUDA GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_one_ends_it(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        assert not interrupts.requested
        signal.raise_signal(number)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


# --- what is shown ------------------------------------------------------------------------------------------

ROW = {
    "step": 5, "test_accuracy": 0.5, "epsilon": 1.25, "delta": 1e-5, "images_per_second": 100.0, "seconds": 2.0,
    "max_grad_norm": 1.0,
}  # fmt: skip


def test_only_a_terminal_sees_private_numbers(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    reporter = make_reporter(quiet=False, start=0, total=10, split="test")
    assert type(reporter) is Lines
    assert not reporter.wants_batches
    with reporter:
        reporter.batch(1.2345, 0.777)
        reporter.step(1, 0.5, 10.0)
        reporter.evaluation(ROW, "test", 10)
    shown = capsys.readouterr().err
    assert "step 5/10: test accuracy 50.00%, epsilon 1.2500, 100 images/s" in shown
    assert "1.23" not in shown
    assert "77" not in shown
    assert type(make_reporter(quiet=True, start=0, total=10, split="test")) is Silent
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert type(make_reporter(quiet=False, start=0, total=10, split="test")) is Bar


def test_the_bar_marks_what_is_private():
    terminal = io.StringIO()
    with Bar(Console(file=terminal, force_terminal=True, width=160), 0, 10, "test") as bar:
        bar.batch(1.2345, 0.777)
        bar.step(1, lambda: 0.5, 10.0)
        bar.evaluation(ROW, "test", 10)
        bar.say("a remark")
    for text in ("5/10", "ε 1.25", "50.0%", "loss 1.23 acc 78% (private)", "a remark"):
        assert text in terminal.getvalue()


@pytest.mark.parametrize("epsilon", [1.0, "inf"])
def test_plots_are_png_files(tmp_path, epsilon):
    assert plot_run(tmp_path, [], split="test") == []
    files = plot_run(tmp_path, [ROW | {"epsilon": epsilon}], split="test")
    assert [f.name for f in files] == ["accuracy_epsilon.png", "clipping_norm.png"]
    assert all(f.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for f in files)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f.name for f in files]


# --- order of release ---------------------------------------------------------------------------------------


def test_the_ledger_is_on_disk_before_anything_it_accounts_for(tmp_path, monkeypatch, tiny_run):
    seen = []

    def noting(name, original):
        def wrapper(self, *args, **kwargs):
            ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
            seen.append((name, sum(event["count"] for event in ledger["events"])))
            return original(self, *args, **kwargs)

        return wrapper

    training = tiny_run(tmp_path / "run", steps=4, eval_every=2)
    monkeypatch.setattr(train, "evaluate", noting("evaluate", train.evaluate))
    monkeypatch.setattr(train.RunFolder, "append_metrics", noting("metrics", train.RunFolder.append_metrics))
    monkeypatch.setattr(
        train.PrivacyEngine, "save_checkpoint", noting("checkpoint", train.PrivacyEngine.save_checkpoint)
    )
    training.run(quiet=True)
    two, four = (
        [("checkpoint", 2), ("evaluate", 2), ("metrics", 2)],
        [("checkpoint", 4), ("evaluate", 4), ("metrics", 4)],
    )
    assert seen == [*two, *four, ("checkpoint", 4)]


def test_the_seed_fixes_the_start_but_not_the_noise(tmp_path, tiny_run):
    runs = [tiny_run(tmp_path / name, steps=2) for name in "ab"]
    starts = [torch.cat([p.detach().flatten() for p in r.model.parameters()]) for r in runs]
    assert torch.equal(*starts)
    for r in runs:
        r.run(quiet=True)
    ends = [torch.cat([p.detach().flatten() for p in r.model.parameters()]) for r in runs]
    assert not torch.equal(*ends)


def test_views_and_dropout_masks_are_secret(tmp_path, tiny_run, monkeypatch):
    """Both go by position in the batch: from a known seed, one example would move many contributions."""
    images = torch.arange(64 * 256).reshape(64, 1, 16, 16)
    views, masks = [], []

    def noting(batch, kind, generator, count=1):
        views.append(augment(images, kind, generator))
        masks.append(nn.functional.dropout(torch.ones(256)))
        return augment(batch, kind, generator, count)

    monkeypatch.setattr("adaclip.augment.augment", noting)
    for name in "ab":
        tiny_run(tmp_path / name, steps=2, max_batch_size=30, augment="shift-flip").run(quiet=True)
        stored = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert not {"rng", "generator", "seed"} & (stored.keys() | stored["extra"].keys())
    assert len(views) >= 4
    for drawn in (views, masks):
        assert not [1 for i, one in enumerate(drawn) for other in drawn[:i] if torch.equal(one, other)]


def test_splitting_batches_and_views_keep_the_steps(tmp_path, tiny_run):
    training = tiny_run(tmp_path / "run", steps=3, max_batch_size=7, augment="shift-flip", ema=0.9)
    summary = training.run(quiet=True)
    assert training.step == 3
    release = SubsampledGaussian(0.2, training.optimizer.noise_multiplier)
    assert training.engine.accountant.history == [Event(release, 3)]
    assert 0 <= summary["test_accuracy"] <= 1


def test_the_adjacency_of_the_settings_is_the_ledgers(tmp_path, tiny_run):
    noise = {}
    for adjacency in ("add_remove", "replace_one"):
        training = tiny_run(tmp_path / adjacency, steps=2, adjacency=adjacency)
        training.run(quiet=True)
        assert Ledger.load(training.folder.ledger).adjacency == adjacency
        noise[adjacency] = training.optimizer.noise_multiplier
    assert noise["replace_one"] > 1.05 * noise["add_remove"]


def test_labels_are_smoothed_in_training_only(tmp_path, tiny_run, monkeypatch):
    original, training_calls, other_calls = train.cross_entropy, [], []

    def noting(logits, labels, **options):
        (training_calls if logits.requires_grad else other_calls).append(options.get("label_smoothing", 0.0))
        # A mean would divide by the private number of rows.
        assert options["reduction"] == "sum" or not logits.requires_grad
        return original(logits, labels, **options)

    monkeypatch.setattr(train, "cross_entropy", noting)
    monkeypatch.setattr(evaluation, "cross_entropy", noting)
    for n, share in enumerate((0.0, 0.25)):
        training = tiny_run(tmp_path / str(n), steps=2, label_smoothing=share)
        assert training.folder.read_config()["train"]["label_smoothing"] == share
        training.run(quiet=True)
    assert training_calls == [0.0, 0.0, 0.25, 0.25]
    assert set(other_calls) == {0.0}


def test_a_validation_part_shrinks_the_training_set(tmp_path, tiny_run):
    training = tiny_run(tmp_path / "run", steps=1, validation=0.25, batch_size=30)
    assert (training.size, training.split) == (150, "validation")
    assert training.sample_rate == 30 / 150
    assert "validation_accuracy" in training.run(quiet=True)


OPTIMIZERS = ["sgd", "adam", "adamw", "nadam", "noise-nadam", "adambc", "disk"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(tmp_path, tiny_run, optimizer):
    training = tiny_run(tmp_path / "run", steps=1, optimizer=optimizer)
    before = [p.detach().clone() for p in training.model.parameters()]
    training.run(quiet=True)
    assert all(not torch.equal(p, q) for p, q in zip(before, training.model.parameters(), strict=True))


def test_floor_and_gain_are_the_optimizers(tmp_path, tiny_run):
    def group(name, **settings):
        return tiny_run(tmp_path / name, steps=1, optimizer=name, **settings).optimizer.param_groups[0]

    assert group("noise-nadam", floor=0.125)["floor"] == 0.125
    # DP-AdamBC's gamma bounds the variance, not the divisor.
    assert group("adambc", floor=0.0625)["absolute_floor"] == 0.25
    assert group("disk", filter_gain=0.5)["kappa"] == 0.5
