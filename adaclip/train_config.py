"""The settings of `adaclip train`: their table and their checks. Needs no torch.

`adaclip.train_sources` says where they come from and which source wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from adaclip.accounting import ADJACENCIES
from adaclip.schemes import SCHEMES

__all__ = ["MACHINE", "TrainConfig", "schedule_parts"]

# What may differ when a run is resumed: it changes where the run computes, not what.
MACHINE = frozenset(
    {"data_dir", "download", "max_batch_size", "device", "precision", "graph", "compile", "threads"}
)


def _setting(default: Any, kind: type, help: str, *, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """One row of the table: kind is int, float, bool or str."""
    return field(default=default, metadata=_row(kind, help, choices, metavar))


def _row(kind: type, help: str, choices: tuple[str, ...] = (), metavar: str = "") -> dict[str, Any]:
    return {"kind": kind, "help": help, "choices": choices, "metavar": metavar}


@dataclass(frozen=True)
class TrainConfig:
    """Every setting that decides what a run computes, and those of the machine it runs on (`MACHINE`).

    Exactly one of epsilon and noise_multiplier, and of epochs and steps, is not None once `check` passed.
    """

    dataset: str = _setting(
        "mnist-mini",
        str,
        "mnist-mini, mnist, cifar10, medical_mnist, folder:PATH, or a MedMNIST name such as breastmnist",
    )
    scheme: str | None = _setting(
        None, str, "a set of settings by name; the other flags change it", choices=tuple(SCHEMES)
    )
    data_dir: str | None = _setting(None, str, "folder with the data; default: a cache folder", metavar="DIR")
    download: bool = _setting(False, bool, "fetch what is missing, checked against known hashes")
    image_size: int | None = _setting(
        None, int, "resize folders to this, or the MedMNIST edition", metavar="PIXELS"
    )
    validation: float = _setting(
        0.0,
        float,
        "hold out this fraction of the TRAINING images and evaluate on them "
        "instead of the test set (for tuning)",
        metavar="FRACTION",
    )
    model: str = _setting("vgg-mini", str, "vgg-mini, vgg-small, vgg11, vgg13, vgg16 or vgg19")
    model_option: dict[str, Any] = field(
        default_factory=dict,
        metadata=_row(
            dict,
            "an option of the model, such as width=32; the value is JSON or else text; may be repeated",
            metavar="KEY=VALUE",
        ),
    )
    epsilon: float | None = _setting(
        None, float, "privacy budget; the noise is calibrated to it and it is enforced"
    )
    delta: float = _setting(1e-5, float, "of (epsilon, delta); choose it below 1 / training images")
    noise_multiplier: float | None = _setting(
        None, float, "instead of --epsilon: noise std / clipping norm", metavar="SIGMA"
    )
    accountant: str = _setting("pld", str, "how epsilon is computed")
    adjacency: str = _setting(
        "add_remove", str, "what the neighbor of a data set is, in the guarantee", choices=ADJACENCIES
    )
    batch_size: int = _setting(512, int, "expected size of a logical (Poisson) batch", metavar="B")
    epochs: int | None = _setting(None, int, "length of the run; an epoch is N / B steps", metavar="E")
    steps: int | None = _setting(None, int, "length of the run, instead of --epochs", metavar="T")
    optimizer: str = _setting(
        "sgd",
        str,
        "the optimizer; noise-nadam and adambc take the noise's variance out of Adam's, disk filters gradients",
        choices=("sgd", "adam", "adamw", "nadam", "noise-nadam", "adambc", "disk"),
    )
    lr: float | None = _setting(
        None, float, "learning rate; default 0.5 for sgd and disk, 1e-3 for the others"
    )
    floor: float | None = _setting(
        None,
        float,
        "of noise-nadam: least divisor in standard deviations of the noise (default 1); of adambc: least variance "
        "(default 1e-8)",
        metavar="KAPPA",
    )
    filter_gain: float = _setting(0.7, float, "of disk: weight of the newest gradient, in (0, 1]")
    momentum: float = _setting(0.0, float, "of sgd")
    weight_decay: float = _setting(0.0, float, "as the optimizer defines it")
    lr_schedule: str = _setting(
        "constant",
        str,
        "what follows the warm-up; cosine and linear fall to 0",
        choices=("constant", "cosine", "linear"),
    )
    warmup: int = _setting(0, int, "steps of linear warm-up", metavar="STEPS")
    clipping: str = _setting(
        "flat",
        str,
        "how a sample's gradient is bounded: one norm or one per layer, fixed or following a private quantile; "
        "normalized (automatic, psac); or chosen from a private histogram (dc_sgd)",
        choices=(
            "flat",
            "per_layer",
            "per_layer_adaptive",
            "adaptive",
            "automatic",
            "psac",
            "dc_sgd",
            "dc_sgd_error",
        ),
    )
    max_grad_norm: float = _setting(
        1.0, float, "clipping norm of a sample's whole gradient; the first one where it adapts", metavar="C"
    )
    norm_schedule: str = _setting(
        "constant",
        str,
        "of flat clipping: KIND:END takes C to END times its first value over the run, KIND being linear, "
        "exponential or cosine",
        metavar="KIND[:END]",
    )
    noise_schedule: str = _setting(
        "constant", str, "the same for the noise multiplier, within the budget", metavar="KIND[:END]"
    )
    quantile: float = _setting(
        0.5, float, "share of gradients that the adaptive norms (and dc_sgd) leave unclipped, in (0, 1)"
    )
    clip_rate: float = _setting(0.2, float, "how fast adaptive norms move")
    quantile_noise: float | None = _setting(
        None,
        float,
        "noise of the quantile's count, or of dc_sgd's histogram; default: by the batch size",
        metavar="SIGMA",
    )
    groups: str = _setting(
        "off",
        str,
        "private statistics of label groups, a class each: report the one with the smallest gradients, give it "
        "less weight, or train on it alone",
        choices=("off", "report", "reweight", "select"),
    )
    group_noise: float = _setting(40.0, float, "of the groups' norm sums", metavar="SIGMA")
    count_noise: float = _setting(40.0, float, "of the groups' counts", metavar="SIGMA")
    smoothing: float = _setting(
        0.0,
        float,
        "smoothed loss: gradients at weights moved by this share of their scale; 0: off",
        metavar="TAU",
    )
    smoothing_signal: str = _setting(
        "snr",
        str,
        "when the loss is smoothed: while the momentum's signal is weak, on a plateau, or always",
        choices=("snr", "plateau", "always"),
    )
    views: int = _setting(
        1, int, "random views of each sample, averaged before the clip; see --augment", metavar="K"
    )
    ema: float = _setting(
        0.0, float, "evaluate an exponential moving average of the weights; 0: off", metavar="DECAY"
    )
    augment: str = _setting(
        "none",
        str,
        "random views of the training images: shifted by up to an eighth or cropped after padding by 4 pixels, "
        "and mirrored",
        choices=("none", "shift", "flip", "shift-flip", "crop", "crop-flip"),
    )
    label_smoothing: float = _setting(
        0.0,
        float,
        "share of every target spread over all classes, in the training loss alone",
        metavar="SHARE",
    )
    seed: int = _setting(
        0,
        int,
        "of the model's initial weights only; sampling, noise, augmentation and dropout always draw from "
        "the operating system",
    )
    eval_every: int | None = _setting(
        None, int, "steps between evaluations; default: a tenth of the run", metavar="STEPS"
    )
    max_batch_size: int | None = _setting(
        None,
        int,
        "split logical batches into physical ones of at most so many images, to save memory",
        metavar="B",
    )
    device: str = _setting("cpu", str, "auto: a GPU if there is one", choices=("cpu", "cuda", "auto"))
    precision: str | None = _setting(
        None,
        str,
        "of products: fp32 (default on the CPU), tf32 (default on a GPU) or bf16, under autocast",
        choices=("fp32", "tf32", "bf16"),
    )
    graph: bool = _setting(
        True, bool, "on a GPU, a whole step as one CUDA graph, over padded batches (not with max_batch_size)"
    )
    compile: bool = _setting(False, bool, "run the model through torch.compile")
    threads: int | None = _setting(None, int, "CPU threads; default: torch's choice", metavar="N")

    def check(self) -> TrainConfig:
        """Return self if every value is in range and the exclusive pairs are decided; else ValueError."""
        for name, given in (
            ("epsilon or noise_multiplier", (self.epsilon, self.noise_multiplier)),
            ("epochs or steps", (self.epochs, self.steps)),
        ):
            if given == (None, None):
                raise ValueError(f"{name} must be given")
        for name, ok, rule in (
            ("epsilon", lambda v: 0 < v < math.inf, "a positive finite number"),
            ("noise_multiplier", lambda v: 0 <= v < math.inf, "finite and at least 0"),
            ("delta", lambda v: 0 < v < 1, "in (0, 1)"),
            ("validation", lambda v: 0 <= v < 1, "in [0, 1)"),
            ("max_grad_norm", lambda v: 0 < v < math.inf, "a positive finite number"),
            ("lr", lambda v: 0 < v < math.inf, "a positive finite number"),
            ("momentum", lambda v: 0 <= v < 1, "in [0, 1)"),
            ("weight_decay", lambda v: 0 <= v < math.inf, "finite and at least 0"),
            ("ema", lambda v: 0 <= v < 1, "in [0, 1)"),
            ("label_smoothing", lambda v: 0 <= v < 1, "in [0, 1)"),
            ("floor", lambda v: 0 < v < math.inf, "a positive finite number"),
            ("filter_gain", lambda v: 0 < v <= 1, "in (0, 1]"),
            ("quantile", lambda v: 0 < v < 1, "in (0, 1)"),
            *(
                (name, lambda v: 0 < v < math.inf, "a positive finite number")
                for name in ("clip_rate", "quantile_noise", "group_noise", "count_noise")
            ),
            ("smoothing", lambda v: 0 <= v < math.inf, "finite and at least 0"),
            ("warmup", lambda v: v >= 0, "at least 0"),
            ("seed", lambda v: 0 <= v < 2**63, "in [0, 2^63)"),
            *(
                (name, lambda v: v >= 1, "at least 1")
                for name in (
                    "batch_size",
                    "views",
                    "epochs",
                    "steps",
                    "eval_every",
                    "max_batch_size",
                    "threads",
                    "image_size",
                )
            ),
        ):
            value = getattr(self, name)
            if value is not None and not ok(value):
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"momentum is sgd's, got momentum {self.momentum:g} with optimizer {self.optimizer}"
            )
        if self.norm_schedule != "constant" and self.clipping != "flat":
            raise ValueError(
                f"norm_schedule must be constant unless clipping is flat, got {self.norm_schedule!r} with "
                f"clipping {self.clipping}"
            )
        for name in ("norm_schedule", "noise_schedule"):
            schedule_parts(name, getattr(self, name))
        return self

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        if self.lr is not None:
            return self.lr
        return 0.5 if self.optimizer in ("sgd", "disk") else 1e-3


def schedule_parts(name: str, text: str) -> tuple[str, float] | None:
    """(kind, end) of a schedule's setting "KIND:END", or None for "constant". Raises ValueError, naming `name`."""
    if text == "constant":
        return None
    kind, _, number = text.partition(":")
    try:
        end = float(number)
    except ValueError:
        end = math.nan
    if kind not in ("linear", "exponential", "cosine") or not 0 < end < math.inf:
        raise ValueError(
            f"{name} must be constant, linear:END, exponential:END or cosine:END with END above 0, got {text!r}"
        )
    return kind, end
