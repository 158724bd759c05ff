"""`adaclip compare`: whole comparisons, cut off and taken up again, tuning, and what the report says."""

import json
import signal

import pytest

from adaclip import compare, train
from adaclip.cli import main
from adaclip.compare import Comparison, RunsFailed, recipe_of
from adaclip.compare_tune import Tuning, parse_grid
from adaclip.train_sources import read_tables, resolve

SHARED = {
    "dataset": "mnist",
    "model": "vgg-mini",
    "model_option": {"width": 4},
    "batch_size": 40,
    "steps": 2,
    "ema": 0.0,
}


pytestmark = pytest.mark.usefixtures("one_thread")


class Ended:
    """A process that has ended."""

    def __init__(self, code):
        self._code = code

    def poll(self):
        return self._code

    wait = poll

    def terminate(self):
        raise AssertionError("it has ended")


@pytest.fixture
def launched(monkeypatch):
    """Runs are made in this process; the words of each."""
    words = []

    def launch(argv, log, threads):
        words.append(list(argv))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("a last line\n\n")
        return Ended(main([*argv, "--quiet"]))

    monkeypatch.setattr(compare, "launch", launch)
    return words


def comparison(out, digits, schemes=("dpsgd", "non-private"), seeds=1, **settings):
    return Comparison(
        out,
        recipe_of(SHARED | settings, None),
        machine={"data_dir": str(digits)},
        schemes=schemes,
        seeds=seeds,
    )


def run(made, **options):
    return made.run(say=lambda text: None, **options)


def run_folders(out):
    return {path.relative_to(out): path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}


def lines(out):
    return (out / "rows.jsonl").read_text().splitlines()


# --- whole comparisons --------------------------------------------------------------------------------------


def test_a_comparison_writes_rows_table_report_and_curves(tmp_path, digits, launched):
    out = tmp_path / "deep" / "out"
    made = comparison(out, digits, ("dpsgd", "dp-nadam", "non-private"), seeds=2)
    assert run(made)
    # All schemes of seed 0 first.
    assert [json.loads(line)["run"] for line in lines(out)] == [
        "dpsgd-s0", "dp-nadam-s0", "non-private-s0", "dpsgd-s1", "dp-nadam-s1", "non-private-s1",
    ]  # fmt: skip
    table = json.loads((out / "table.json").read_text())
    rows = {row["scheme"]: row for row in table["rows"]}
    assert [row["n"] for row in table["rows"]] == [2, 2, 2]
    assert rows["dpsgd"]["noise_multiplier"] == rows["dp-nadam"]["noise_multiplier"] > 0
    assert 2.9 < rows["dpsgd"]["epsilon"] <= 3.0
    assert (rows["non-private"]["epsilon"], rows["non-private"]["noise_multiplier"]) == ("inf", 0.0)
    for row in rows.values():
        assert row["accuracy_mean"] == pytest.approx(sum(row["accuracies"]) / 2)
        assert row["steps"] == 2
    report = (out / "report.md").read_text()
    for text in ("| dpsgd | 2 |", "| non-private | 2 |", "2 steps, expected batch 40", "not accounted for"):
        assert text in report
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    seeds = {
        json.loads((out / "runs" / f"dpsgd-s{s}" / "config.json").read_text())["train"]["seed"]
        for s in (0, 1)
    }
    assert seeds == {0, 1}


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_a_comparison_cut_off_keeps_its_finished_rows(tmp_path, digits, launched, monkeypatch, how):
    out, inline = tmp_path / "out", compare.launch

    def cut(argv, log, threads):
        if len(launched) == 2:
            if how == "crash":
                raise MemoryError
            signal.raise_signal(signal.SIGTERM)
            return Ended(-15)
        return inline(argv, log, threads)

    monkeypatch.setattr(compare, "launch", cut)
    if how == "crash":
        with pytest.raises(MemoryError):
            run(comparison(out, digits, seeds=2))
    else:
        assert not run(comparison(out, digits, seeds=2))
    finished, folders = lines(out), run_folders(out)
    assert [json.loads(line)["run"] for line in finished] == ["dpsgd-s0", "non-private-s0"]
    table = json.loads((out / "table.json").read_text())
    assert table["missing"] == {"dpsgd": 1, "non-private": 1}
    assert "Not finished: dpsgd (1), non-private (1)." in (out / "report.md").read_text()

    monkeypatch.setattr(compare, "launch", inline)
    assert run(comparison(out, digits, seeds=2))
    assert len(launched) == 4
    assert lines(out)[:2] == finished
    assert len(lines(out)) == 4
    assert folders.items() <= run_folders(out).items()
    whole = json.loads((out / "table.json").read_text())
    assert whole["missing"] == {}
    assert whole["seconds"] > table["seconds"] > 0
    # A third time there is nothing to do.
    everything = run_folders(out)
    assert run(comparison(out, digits, seeds=2))
    assert (len(launched), run_folders(out)) == (4, everything)
    assert json.loads((out / "table.json").read_text())["seconds"] == whole["seconds"]


def test_a_run_broken_off_is_resumed_and_one_that_never_began_is_made_anew(
    tmp_path, digits, launched, monkeypatch
):
    out, original = tmp_path / "out", train.learning_rate

    def interrupted(config, at, total):
        if at == 2:
            signal.raise_signal(signal.SIGINT)
        return original(config, at, total)

    monkeypatch.setattr(train, "learning_rate", interrupted)
    with pytest.raises(RunsFailed, match=r"1 of 1 runs failed: dpsgd-s0 ended with code 130: a last line"):
        run(comparison(out, digits, ("dpsgd",), steps=4))
    monkeypatch.setattr(train, "learning_rate", original)
    begun = out / "runs" / "non-private-s0"
    begun.mkdir()
    (begun / "ledger.json").write_text("{")
    assert run(comparison(out, digits, steps=4))
    assert [words[1] for words in launched] == ["--config", "--resume", "--config"]
    ledger = json.loads((out / "runs" / "dpsgd-s0" / "ledger.json").read_text())
    assert [event["count"] for event in ledger["events"]] == [4]
    assert len(lines(out)) == 2


def test_schemes_and_seeds_may_be_added_but_settings_stay(tmp_path, digits, launched):
    out = tmp_path / "out"
    run(comparison(out, digits, ("dpsgd",)))
    before = lines(out)
    with pytest.raises(ValueError, match=r"batch_size of dpsgd-s0 must be what .*was made with, 40, got 50"):
        comparison(out, digits, ("dpsgd",), batch_size=50)
    assert lines(out) == before
    assert run(comparison(out, digits, ("non-private",), seeds=2))
    assert [json.loads(line)["run"] for line in lines(out)] == [
        "dpsgd-s0",
        "non-private-s0",
        "non-private-s1",
    ]
    table = json.loads((out / "table.json").read_text())
    assert [(row["scheme"], row["n"]) for row in table["rows"]] == [("dpsgd", 1), ("non-private", 2)]
    assert table["missing"] == {"dpsgd": 1}


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, digits, launched, monkeypatch):
    inline = compare.launch

    def launch(argv, log, threads):
        ended = inline(argv, log, threads)
        return Ended(2) if "--scheme=dpsgd" in argv else ended

    monkeypatch.setattr(compare, "launch", launch)
    with pytest.raises(RunsFailed, match=r"1 of 2 runs failed: dpsgd-s0 ended with code 2: a last line"):
        run(comparison(tmp_path / "out", digits))
    assert [json.loads(line)["run"] for line in lines(tmp_path / "out")] == ["non-private-s0"]


def test_processes_of_their_own(tmp_path, capsys):
    argv = [
        "compare", "--schemes", "dpsgd", "--seeds", "1", "--jobs", "2", "--threads", "1", "--out",
        str(tmp_path / "out"), "--model-option", "width=4", "--batch-size", "100", "--steps", "2", "--json",
        "--export", str(tmp_path / "mini"),
    ]  # fmt: skip
    assert main(argv) == 0
    assert (tmp_path / "mini.md").exists()
    shown = capsys.readouterr()
    table = json.loads(shown.out)
    assert [row["scheme"] for row in table["rows"]] == ["dpsgd"]
    assert (table["dataset"], table["training_images"], table["evaluation_images"]) == (
        "mnist-mini",
        4000,
        1000,
    )
    assert table["threads"] == 1
    assert table["command"].startswith("adaclip compare --schemes dpsgd --seeds 1")
    assert "dpsgd-s0: test accuracy" in shown.err
    assert "step 2/2: test accuracy" in (tmp_path / "out" / "logs" / "dpsgd-s0.log").read_text()


# --- arguments ----------------------------------------------------------------------------------------------


def test_what_a_scheme_decides_is_no_flag(tmp_path):
    with pytest.raises(ValueError, match=r"--lr must not be given to a comparison, .*\[scheme\.NAME\]"):
        recipe_of({"lr": 1.0}, None)
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nscheme = "dpsgd"\n')
    with pytest.raises(ValueError, match="must not set scheme"):
        recipe_of({}, path)
    path.write_text("[train]\nepochs = 3\nema = 0.5\n[scheme.dpsgd]\nlr = 0.25\n")
    recipe = recipe_of({"steps": 7, "data_dir": "data"}, path)
    assert (recipe.train, recipe.schemes) == ({"ema": 0.5, "steps": 7}, {"dpsgd": {"lr": 0.25}})
    assert resolve({"scheme": "dpsgd"}, recipe).lr == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ["dpsgd", "fast"]}, "scheme must be one of adaptive, .*got 'fast'"),
        ({"schemes": []}, "schemes must be different names, at least one"),
        ({"schemes": ["dpsgd", "dpsgd"]}, "schemes must be different names"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, digits, options, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path / "out", digits, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, digits):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no comparison"):
        comparison(tmp_path, digits)
    with pytest.raises(ValueError, match="is not empty and holds no tuning"):
        Tuning(tmp_path, recipe_of(SHARED, None), machine={}, schemes=["dpsgd"], grids=[], fraction=0.1)
    with pytest.raises(ValueError, match="jobs must be a whole number of at least 1, got 0"):
        run(comparison(tmp_path / "out", digits), jobs=0)


def test_the_command_line_shows_errors_as_paragraphs(tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path / "o"), "--schemes", "fast"]) == 2
    assert capsys.readouterr().err.startswith("adaclip compare: error: scheme must be one of")
    assert main(["compare", "--out", str(tmp_path / "o"), "--lr", "1"]) == 2
    assert "put lr into a table [scheme.NAME]" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path / "o"), "--tune", "lr=1", "--export", "x"]) == 2
    assert "--export must be left out with --tune" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# --- tuning -------------------------------------------------------------------------------------------------


def test_tuning_writes_the_best_of_the_grid(tmp_path, digits, launched):
    def tuning():
        return Tuning(
            tmp_path / "out",
            recipe_of(SHARED, None),
            machine={"data_dir": str(digits)},
            schemes=["dpsgd", "dp-nadam"],
            grids=[parse_grid("lr=x0.25,x1"), parse_grid("dpsgd:max_grad_norm=0.5")],
            fraction=0.25,
        )

    assert run(tuning())
    assert len(launched) == 4
    rows = tuning().rows()
    assert set(rows) == {
        "dpsgd/lr=1.0,max_grad_norm=0.5", "dpsgd/lr=4.0,max_grad_norm=0.5", "dp-nadam/lr=0.005", "dp-nadam/lr=0.02",
    }  # fmt: skip
    assert {row["split"] for row in rows.values()} == {"validation"}
    best = tuning().best(rows)
    for scheme, row in best.items():
        assert row["accuracy"] == max(r["accuracy"] for r in rows.values() if r["scheme"] == scheme)
    tuned = read_tables(tmp_path / "out" / "tuned.toml")
    assert tuned.train == SHARED
    assert tuned.schemes == {scheme: best[scheme]["point"] for scheme in ("dpsgd", "dp-nadam")}
    assert resolve({"scheme": "dpsgd"}, tuned).max_grad_norm == 0.5
    assert run(tuning())
    assert len(launched) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", r"tune must be \[SCHEME:\]KEY=VALUE"),
        (":lr=1", r"tune must be \[SCHEME:\]KEY=VALUE"),
        ("batch_size=1,2", "a tuned setting must be one that schemes decide, .*got 'batch_size'"),
        ("fast:lr=1", "scheme must be one of"),
        ("lr=1,1", "values of lr must be different"),
        ("lr=big", "lr must be a number, got 'big'"),
        ("lr=xx", "lr must be a value, or x and a factor"),
        ("clipping=round", "clipping in the command line must be one of flat"),
    ],
)
def test_wrong_grids_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(text)


def test_only_numbers_have_multiples():
    with pytest.raises(ValueError, match="lr must be a value, or x and a factor of a number"):
        parse_grid("lr=x2").values(None)
    assert parse_grid("quantile=0.3,x0.5").values(0.5) == [0.3, 0.25]
