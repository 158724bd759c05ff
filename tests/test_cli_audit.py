"""`adaclip audit` through the command line's own entry point."""

import json

import pytest

import adaclip.optimizer
from adaclip.cli import main

SMALL = ["audit", "--steps", "60", "--canaries", "100", "--sample-rate", "0.2"]


@pytest.fixture(autouse=True)
def _threads(set_threads):
    set_threads(1)


def test_the_engine_passes_and_says_how_much_is_proven(capsys):
    assert main(SMALL) == 0
    told = capsys.readouterr().out
    assert "PASS" in told
    assert "of the claim" in told


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--clipping", "per_layer"],
        ["--clipping", "automatic"],
        ["--clipping", "adaptive", "--groups", "3", "--side-trials", "200"],
        ["--clipping", "dc_sgd", "--side-trials", "200"],
        ["--method", "one-run"],
        ["--method", "one-run", "--clipping", "adaptive", "--groups", "2"],
        ["--method", "two-run", "--runs", "4"],
    ],
)
def test_json_names_claim_and_verdict(extra, capsys):
    assert main([*SMALL, "--epsilon", "2", "--json", *extra]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "PASS"
    assert told["epsilon_claimed"] == pytest.approx(2.0, rel=1e-3)
    assert 0.0 <= told["epsilon_lower"] <= 2.0
    assert told["steps"] == 60
    assert told["canaries"] == 100


def test_what_is_released_beside_the_gradient_is_checked_too(capsys):
    extra = ["--clipping", "adaptive", "--groups", "2", "--side-trials", "100", "--json"]
    assert main([*SMALL, *extra]) == 0
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    for part in ("threshold 0 of the next step", "the selected group", "group 1 of the noisy counts"):
        assert any(part in name for name in names), names


def test_few_canaries_are_joined_by_other_examples(capsys):
    assert main(["audit", "--steps", "20", "--canaries", "2", "--sample-rate", "0.05", "--json"]) == 0
    rate = next(m for m in json.loads(capsys.readouterr().out)["measurements"] if m["name"] == "q")
    assert rate["claimed"] == 0.05


def test_a_broken_engine_is_flagged_with_exit_code_1(monkeypatch, capsys):
    update = adaclip.optimizer.noisy_update

    def quieter(optimizer, params, stds, *rest, **options):
        update(optimizer, params, [0.5 * std for std in stds], *rest, **options)

    monkeypatch.setattr(adaclip.optimizer, "noisy_update", quieter)
    assert main(SMALL) == 1
    assert "FLAG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--epsilon", "0"], "epsilon"),
        (["--delta", "1"], "delta"),
        (["--steps", "0"], "steps"),
        (["--canaries", "0"], "canaries"),
        (["--sample-rate", "1.5"], "sample-rate"),
        (["--max-grad-norm", "-1"], "max_grad_norm"),
        (["--confidence", "1"], "confidence"),
        (["--seed", "-1"], "seed"),
        (["--runs", "5"], "runs"),
        (["--groups", "0"], "groups"),
        (["--side-trials", "0"], "side-trials"),
        (["--clipping", "soft"], "clipping"),
        (["--method", "two-run", "--runs", "1"], "runs"),
        (["--method", "guess"], "method"),
        (["--accountant", "none"], "accountant"),
    ],
)
def test_bad_arguments_end_with_exit_code_2(arguments, name, capsys):
    assert main([*SMALL, *arguments]) == 2
    assert name in capsys.readouterr().err
