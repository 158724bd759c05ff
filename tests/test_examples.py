"""The scripts of docs/examples run, in a small way."""

import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from small_engine import data, small_model
from torch.utils.data import DataLoader, TensorDataset

from adaclip import validate
from adaclip.testing import square_loss

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lightning(tmp_path):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer, private = example("lightning_mnist").main(1, 500, default_root_dir=tmp_path, **options)
    assert private.engine.get_epsilon(1e-5) == pytest.approx(3.0, abs=0.01)
    assert trainer.callback_metrics.keys() >= {"accuracy", "epsilon"}
    # The two releases of its one epoch are in the checkpoint that the trainer wrote by itself.
    assert list(tmp_path.rglob("*.ckpt"))


def test_accelerate():
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from accelerate.state import AcceleratorState, GradientState

    try:
        engine, _, optimizer = example("accelerate_mnist").main(2, 500, cpu=True)
        assert engine.get_epsilon(1e-5) == pytest.approx(3.0, abs=0.01)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-6)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_fine_tuning():
    engine, _, _ = example("fine_tuning").main(1, 400)
    assert engine.get_epsilon(1e-5) == pytest.approx(3.0, abs=0.01)


def test_every_example_is_run_here():
    here = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in here for path in EXAMPLES.glob("*.py"))


def test_the_page_on_training_habits():
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "training.md").read_text(), re.S)
    x, y = data(40)
    names = {
        "model": small_model(),
        "loader": DataLoader(TensorDataset(x, y), batch_size=10),
        "criterion": square_loss,
    }
    with redirect_stdout(io.StringIO()) as printed:
        for block in blocks:
            exec(compile(block, "training.md", "exec"), names)
    assert "1 (BatchNorm2d) mixes the samples of a batch" in printed.getvalue()
    assert names["optimizer"].releases == names["scheduler"].last_epoch == 4
    assert validate(names["tuned"]) == []


def test_adaclip_imports_none_of_the_trainers():
    code = (
        "import sys, adaclip, adaclip.engine, adaclip.integrations;"
        "print([m for m in ('lightning', 'accelerate', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
