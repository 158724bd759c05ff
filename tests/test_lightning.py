"""The callback for PyTorch Lightning."""

import copy
import logging
import warnings

import pytest
import torch
from small_engine import KEY, data, flat, private, small_model, train
from torch.utils.data import DataLoader, TensorDataset

from adaclip.smoothing import SmoothedLoss
from adaclip.testing import square_loss

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from adaclip.integrations.lightning import PrivateTraining  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|log_every_n_steps).*")


class Lit(pl.LightningModule):
    def __init__(self, interval=None):
        super().__init__()
        self.net = small_model()
        self.interval = interval
        self.batches, self.rates = [], []

    def training_step(self, batch, index):
        x, y = batch
        self.batches.append(len(x))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return square_loss(self.net(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val", square_loss(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.interval is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def loader(n=40, batch_size=10):
    return DataLoader(TensorDataset(*data(n)), batch_size=batch_size)


def trainer(*callbacks, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, "barebones": False, **options}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(model, epochs=2, trainer_options=None, ckpt_path=None, val=True, **options):
    options.setdefault("noise_generator", KEY)
    callback = PrivateTraining(**options)
    made = trainer(callback, epochs=epochs, **(trainer_options or {}))
    with warnings.catch_warnings():
        # Theirs, about workers and logging; order of scheduler and optimizer must not be among them.
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        made.fit(model, callback.loader(loader()), loader() if val else None, ckpt_path=ckpt_path)
    return made, callback


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("smoothing", [False, True])
def test_fit_is_the_plain_loop(size, smoothing):
    def options():
        return {"smoothing": SmoothedLoss(0.05)} if smoothing else {}

    model = Lit()
    made, callback = fit(model, noise_multiplier=1.0, max_batch_size=size, **options())
    plain_model = small_model()
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    engine, plain_model, optimizer, plain_loader = private(
        plain_model, optimizer=optimizer, max_batch_size=size, **options()
    )
    train(plain_model, optimizer, plain_loader, epochs=2)
    assert torch.equal(flat(model.net), flat(plain_model))
    assert callback.engine.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    assert made.callback_metrics["epsilon"].item() == pytest.approx(engine.get_epsilon(1e-5), rel=1e-6)
    assert made.current_epoch == 2
    # The model is given back as it was.
    assert "forward" not in model.__dict__
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("size", [None, 3])
def test_a_scheduler_steps_with_logical_batches(size):
    model = Lit("step")
    fit(model, noise_multiplier=1.0, max_batch_size=size)
    rates = list(dict.fromkeys(model.rates))
    assert rates == [pytest.approx(0.1 * 0.9**i) for i in range(8)]
    model = Lit("epoch")
    fit(model, noise_multiplier=1.0, max_batch_size=size)
    assert list(dict.fromkeys(model.rates)) == [0.1, pytest.approx(0.09)]


def test_a_budget_stops_training_cleanly():
    """After the last step that fits: validation and the end of the epoch come, and nothing is raised."""
    model = Lit()
    made, callback = fit(
        model, epochs=10, target_epsilon=3.0, target_delta=1e-5, steps=6, max_batch_size=3, val=True
    )
    assert len(callback.engine.accountant) == 6
    assert 2.9 < callback.engine.get_epsilon(1e-5) <= 3.0
    assert made.current_epoch <= 2
    assert "val" in made.callback_metrics


@pytest.mark.filterwarnings("ignore:shuffled batches")
def test_a_budget_of_shuffled_epochs():
    model = Lit()
    options = {"target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 3, "poisson_sampling": False}
    callback = PrivateTraining(**options)
    trainer(callback, epochs=10).fit(model, callback.loader(loader()))
    assert len(callback.engine.accountant) == 3
    assert len(model.batches) == 12


class SaveAt(pl.Callback):
    """Saves within an epoch, after a batch."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_checkpoints_carry_the_ledger(tmp_path):
    inside = tmp_path / "inside.ckpt"
    callback = PrivateTraining(noise_multiplier=1.0)
    made = trainer(callback, SaveAt(inside, 6), epochs=2)
    made.fit(Lit("step"), callback.loader(loader()))
    saved = torch.load(inside, weights_only=True)["callbacks"]["PrivateTraining"]
    assert saved["releases"] == 6
    model = Lit("step")
    resumed, callback = fit(model, epochs=3, noise_multiplier=1.0, ckpt_path=inside)
    # Six steps of the checkpoint, and those that this run made.
    assert len(callback.engine.accountant) == 6 + len(model.batches)
    assert resumed.current_epoch == 3
    # The scheduler goes on as well.
    assert model.rates[0] == pytest.approx(0.1 * 0.9**6)
    # After the end as well.
    after = tmp_path / "after.ckpt"
    resumed.save_checkpoint(after)
    _, callback = fit(Lit("step"), epochs=4, noise_multiplier=1.0, ckpt_path=after)
    assert len(callback.engine.accountant) == 6 + len(model.batches) + 4
    with pytest.raises(ValueError, match=r"noise_multiplier must be the checkpoint's 1\.0, got 2.0"):
        fit(Lit("step"), epochs=3, noise_multiplier=2.0, ckpt_path=inside)


def test_a_checkpoint_without_a_ledger_is_refused(tmp_path):
    plain = trainer(epochs=1)
    plain.fit(Lit(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="was saved without this callback"):
        fit(Lit(), epochs=2, noise_multiplier=1.0, ckpt_path=tmp_path / "plain.ckpt")


class Estimates(Lit):
    """Asks for the number of steps before there is an optimizer."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_the_number_of_steps_can_be_asked_for():
    """47 examples in batches of 10: 5 batches of an ordinary loader, and 5 = round(4.7) Poisson ones; of 44, 4."""
    for n, steps in ((47, 5), (44, 4)):
        model, callback = Estimates(), PrivateTraining(noise_multiplier=1.0)
        made = trainer(callback, epochs=2)
        made.fit(model, callback.loader(loader(n)), loader())
        assert model.steps == len(callback.engine.accountant) == 2 * steps
        assert "val" in made.callback_metrics
    with pytest.raises(RuntimeError, match="with max_batch_size that number is unknown"):
        fit(Estimates(), noise_multiplier=1.0, max_batch_size=3)


@pytest.mark.parametrize(
    ("trainer_options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val must be None"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1, got 2.*max_batch_size"),
    ],
)
def test_what_private_training_cannot_have_is_refused(trainer_options, message):
    model = Lit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(model, trainer_options=trainer_options, noise_multiplier=1.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_an_ordinary_loader_is_refused():
    callback = PrivateTraining(noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"private\.loader\(train_loader\)"):
        trainer(callback).fit(Lit(), loader())
    wrapped = callback.loader(loader())
    other = PrivateTraining(noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"private\.loader\(train_loader\)"):
        trainer(other).fit(Lit(), wrapped)
    # Two loaders of which the wrong one is trained from: its batches are not the private loader's.
    other.loader(loader())
    model = Lit()
    with pytest.raises(ValueError, match=r"private\.loader\(train_loader\)"):
        trainer(other).fit(model, loader())
    assert other.engine.accountant.history == []
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_two_optimizers_are_refused():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in list(self.parameters())[:2]]

    with pytest.raises(ValueError, match="one optimizer, got 2"):
        fit(Two(), noise_multiplier=1.0)


def test_a_model_that_cannot_be_private_is_reported_and_left():
    class Bad(Lit):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))

    with pytest.raises(Exception, match=r"net\.1 \(BatchNorm2d\)"):
        fit(Bad(), noise_multiplier=1.0)


def test_an_error_in_the_loop_gives_the_model_back():
    class Fails(Lit):
        def on_train_batch_end(self, *args):
            raise ArithmeticError("mine")

    model = Fails()
    with pytest.raises(ArithmeticError, match="mine"):
        fit(model, noise_multiplier=1.0)
    assert all("forward" not in m.__dict__ for m in model.modules())
