"""adaclip.train_config: precedence, checks, and what a resumed run may change."""

import argparse
import dataclasses
from importlib import resources
from pathlib import Path

import pytest

from adaclip.schemes import ABLATIONS, OWNED, SCHEMES, chain
from adaclip.train_config import TrainConfig
from adaclip.train_sources import (
    Tables,
    add_flags,
    flags_given,
    read_tables,
    resolve,
    resume_with,
    write_tables,
)


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return flags_given(parser.parse_args(argv))


def toml(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\n" + text)
    return path


def test_flags_win_over_the_file_over_the_data_set_over_the_defaults(tmp_path):
    shipped = resolve(parse())
    assert shipped.dataset == "mnist-mini"
    assert shipped.epsilon == 3.0
    assert shipped.seed == TrainConfig.seed == 0
    path = toml(tmp_path, "epsilon = 2\nseed = 7\nbatch_size = 99\n")
    from_file = resolve(parse(), path)
    assert (from_file.epsilon, from_file.seed, from_file.batch_size) == (2.0, 7, 99)
    assert from_file.max_grad_norm == shipped.max_grad_norm
    both = resolve(parse("--epsilon", "1", "--batch-size", "50"), path)
    assert (both.epsilon, both.seed, both.batch_size) == (1.0, 7, 50)


def test_label_smoothing_is_off_until_asked_for(tmp_path):
    assert resolve({}).label_smoothing == TrainConfig.label_smoothing == 0.0
    assert resolve(parse("--label-smoothing", "0.1")).label_smoothing == 0.1
    assert resolve({}, toml(tmp_path, "label_smoothing = 0.25")).label_smoothing == 0.25
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1\.5"):
        resolve(parse("--label-smoothing", "1.5"))


def test_the_data_set_named_in_the_file_brings_its_own_config(tmp_path):
    assert resolve({}, toml(tmp_path, 'dataset = "cifar10"')) == resolve({"dataset": "cifar10"})
    assert resolve({"dataset": "mnist"}, toml(tmp_path, 'dataset = "cifar10"')) == resolve(
        {"dataset": "mnist"}
    )


def test_one_of_an_exclusive_pair_replaces_the_other(tmp_path):
    config = resolve(parse("--noise-multiplier", "1.5", "--epochs", "3"))
    assert (config.epsilon, config.noise_multiplier) == (None, 1.5)
    assert (config.steps, config.epochs) == (None, 3)
    with pytest.raises(ValueError, match="only one of epochs and steps may be given, got both in flags"):
        resolve(parse("--epochs", "3", "--steps", "9"))
    with pytest.raises(ValueError, match=r"only one of epsilon and noise_multiplier.*mine\.toml"):
        resolve({}, toml(tmp_path, "epsilon = 1.0\nnoise_multiplier = 1.0"))


def test_another_model_or_optimizer_drops_what_was_tuned_for_the_old_one(tmp_path):
    assert resolve({}).model_option == {"width": 16}
    assert resolve(parse("--model", "vgg11")).model_option == {}
    assert resolve(parse("--model", "vgg-mini")).model_option == {"width": 16}
    merged = resolve(parse("--model-option", "groups=2", "--model-option", "head=fc")).model_option
    assert merged == {"width": 16, "groups": 2, "head": "fc"}
    adam = resolve(parse("--optimizer", "adam"))
    assert (adam.lr, adam.momentum, adam.learning_rate) == (None, 0.0, 1e-3)
    with pytest.raises(ValueError, match="momentum is sgd's"):
        resolve(parse("--optimizer", "adam", "--momentum", "0.5"))


# --- schemes ----------------------------------------------------------------------------------------------


def test_a_scheme_stands_just_below_the_source_that_names_it(tmp_path):
    path = toml(
        tmp_path,
        'optimizer = "adam"\nlr = 7.0\nclipping = "psac"\n[scheme.dpsgd]\nlr = 3.0\n[scheme.psac]\nlr = 9.0\n',
    )
    plain = resolve({}, path)
    assert (plain.scheme, plain.optimizer, plain.clipping, plain.lr) == (None, "adam", "psac", 7.0)
    by_flag = resolve(parse("--scheme", "dpsgd"), path)
    assert (by_flag.optimizer, by_flag.clipping, by_flag.lr) == ("sgd", "flat", 3.0)
    assert resolve(parse("--scheme", "dpsgd", "--lr", "0.5"), path).lr == 0.5
    named_in_file = resolve({}, toml(tmp_path, 'scheme = "dpsgd"\nlr = 7.0\n[scheme.dpsgd]\nlr = 3.0\n'))
    assert (named_in_file.scheme, named_in_file.lr, named_in_file.momentum) == ("dpsgd", 7.0, 0.0)


def test_an_ablation_differs_from_its_base_by_what_its_name_says(tmp_path):
    path = tmp_path / "tuned.toml"
    path.write_text('[scheme.adaptive]\nlr = 0.02\nfloor = 2.0\nema = 0.5\ngroups = "reweight"\n')
    whole = dataclasses.asdict(resolve({"scheme": "adaptive"}, path))
    assert (whole["lr"], whole["floor"], whole["ema"], whole["groups"]) == (0.02, 2.0, 0.5, "reweight")
    for name in ABLATIONS:
        part = dataclasses.asdict(resolve({"scheme": name}, path))
        differing = {key for key in whole if whole[key] != part[key]} - {"scheme"}
        allowed = set(SCHEMES[name].settings) | (
            {"floor"} if "optimizer" in SCHEMES[name].settings else set()
        )
        assert differing
        assert differing <= allowed
    path.write_text(path.read_text() + "[scheme.adaptive-no-ema]\nlr = 0.5\n")
    assert resolve({"scheme": "adaptive-no-ema"}, path).lr == 0.5
    assert resolve({"scheme": "adaptive"}, path).lr == 0.02


@pytest.mark.parametrize("dataset", ["mnist-mini", "mnist", "cifar10", "medical_mnist", "breastmnist"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_fits_every_shipped_config(dataset, scheme):
    plain, config = resolve({"dataset": dataset}), resolve({"dataset": dataset, "scheme": scheme})
    assert config.scheme == scheme
    for shared in (
        "model",
        "model_option",
        "batch_size",
        "steps",
        "epochs",
        "delta",
        "label_smoothing",
        "augment",
    ):
        assert getattr(config, shared) == getattr(plain, shared)
    if scheme == "non-private":
        assert (config.epsilon, config.noise_multiplier) == (None, 0.0)
    else:
        assert config.epsilon == plain.epsilon
    assert config.lr is not None


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[1] / "bench" / "recipes").glob("*.toml")),
    ids=lambda path: path.stem,
)
def test_every_recipe_leaves_to_the_schemes_what_they_decide(path):
    recipe = read_tables(path)
    assert not OWNED & recipe.train.keys()
    for scheme in SCHEMES:
        config = resolve({"scheme": scheme}, recipe)
        assert {name: getattr(config, name) for name in recipe.train.keys() - {"epsilon", "ema"}} == {
            name: value for name, value in recipe.train.items() if name not in ("epsilon", "ema")
        }


def test_unknown_schemes_are_listed():
    with pytest.raises(ValueError, match=r"scheme must be one of adaptive, dpsgd, .*got 'fast'"):
        chain("fast")


def test_tables_survive_being_written(tmp_path):
    tables = Tables(
        {"dataset": 'folder:a "b"\\ü', "delta": 1e-5, "download": True, "batch_size": 7, "epsilon": 1e16}
        | {"model_option": {"plan": [16, "M", 32], "dropout": 0.5}},
        {"dpsgd": {"lr": 0.1}, "adaptive-no-ema": {"floor": 2.0}},
    )
    path = tmp_path / "written.toml"
    path.write_text(write_tables(tables), encoding="utf-8")
    assert read_tables(path) == tables
    path.write_text(write_tables(Tables({"lr": None, "epsilon": 3.0}, {})), encoding="utf-8")
    assert read_tables(path) == Tables({"epsilon": 3.0}, {})


def test_every_shipped_config_is_complete():
    for entry in (resources.files("adaclip") / "configs").iterdir():
        name = entry.name.removesuffix(".toml")
        dataset = {"medmnist": "breastmnist", "folder": "folder:/images"}.get(name, name)
        config = resolve({"dataset": dataset})
        assert config.epsilon is not None
        assert config.delta == 1e-5


def test_unknown_data_sets_are_listed():
    with pytest.raises(ValueError, match=r"dataset must be one of mnist-mini, mnist, .*got 'imagenet'"):
        resolve({"dataset": "imagenet"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1.0\nbeta = 2", "unknown settings 'learning_rate', 'beta'; known are dataset"),
        ('epsilon = "three"', "epsilon in .* must be a number, got 'three'"),
        ("batch_size = 1.5", "batch_size in .* must be an integer, got 1.5"),
        ("batch_size = true", "batch_size in .* must be an integer, got True"),
        ('optimizer = "lion"', "optimizer in .* must be one of sgd, adam, adamw, nadam, .*got 'lion'"),
        ("[other]", r"must hold the table \[train\], tables \[scheme.NAME\] or both, got 'train', 'other'"),
        ("[scheme.fast]\nlr = 1.0", "tables for unknown schemes 'fast'; known are adaptive, dpsgd"),
        ("[scheme.dpsgd]\nrate = 1.0", r"\[scheme.dpsgd\] of .* has unknown settings 'rate'"),
        ('[scheme.dpsgd]\nscheme = "dp-adam"', r"\[scheme.dpsgd\] in .* must not set scheme or dataset"),
        ("[scheme]\ndpsgd = 1", r"must hold the table \[train\]"),
        ('scheme = "fast"', "scheme in .* must be one of adaptive, dpsgd, .*got 'fast'"),
        ('norm_schedule = "falling"', "norm_schedule must be constant, linear:END, .*got 'falling'"),
        ('noise_schedule = "linear:0"', "noise_schedule must be constant, linear:END, .*got 'linear:0'"),
        ('clipping = "automatic"\nnorm_schedule = "linear:0.5"', "norm_schedule must be constant unless"),
        ("lr = ", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_key_rule_and_value(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        resolve({}, toml(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epsilon", [0.0, -1.0, float("inf"), float("nan")]),
        ("noise_multiplier", [-0.1, float("inf"), float("nan")]),
        ("delta", [0.0, 1.0, -1e-5, float("nan")]),
        ("max_grad_norm", [0.0, -1.0, float("inf")]),
        ("lr", [0.0, -1.0]),
        ("momentum", [-0.1, 1.0]),
        ("weight_decay", [-1.0]),
        ("ema", [-0.1, 1.0]),
        ("label_smoothing", [-0.1, 1.0, float("nan")]),
        ("validation", [-0.1, 1.0]),
        ("batch_size", [0]),
        ("steps", [0]),
        ("epochs", [-1]),
        ("warmup", [-1]),
        ("seed", [-1, 2**63]),
        ("threads", [0]),
        ("eval_every", [0]),
        ("max_batch_size", [0]),
        ("views", [0]),
        ("quantile", [0.0, 1.0, float("nan")]),
        ("clip_rate", [0.0, float("inf")]),
        ("quantile_noise", [0.0]),
        ("group_noise", [-1.0]),
        ("count_noise", [0.0]),
        ("smoothing", [-0.1, float("nan")]),
        ("floor", [0.0]),
        ("filter_gain", [0.0, 1.1]),
        ("image_size", [0]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be "):
            resolve({name: value})


def test_length_and_privacy_must_be_given_somewhere():
    with pytest.raises(ValueError, match="epsilon or noise_multiplier must be given"):
        TrainConfig(steps=1).check()
    with pytest.raises(ValueError, match="epochs or steps must be given"):
        TrainConfig(epsilon=1.0).check()


def test_a_resumed_run_keeps_its_settings_and_may_change_machine():
    saved = dataclasses.asdict(resolve({"lr": 0.25}))
    assert dataclasses.asdict(resume_with(saved, {})) == saved
    moved = resume_with(saved, {"threads": 2, "device": "auto", "data_dir": "elsewhere", "lr": 0.25})
    assert dataclasses.asdict(moved) == saved | {"threads": 2, "device": "auto", "data_dir": "elsewhere"}
    assert resume_with(saved, {"model_option": {"width": 16}}).model_option == {"width": 16}
    with pytest.raises(ValueError, match=r"--lr must be what the run was started with, 0\.25, got 0\.5"):
        resume_with(saved, {"lr": 0.5})
    with pytest.raises(ValueError, match="--model-option must be"):
        resume_with(saved, {"model_option": {"width": 8}})
    with pytest.raises(ValueError, match=r"config\.json has unknown settings 'wings'"):
        resume_with(saved | {"wings": 2}, {})
