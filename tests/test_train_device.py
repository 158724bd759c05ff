"""Where `adaclip train` computes: precision, layouts, and steps that are graphs."""

import pytest
import torch
from emulated_graph import Again

from adaclip import train_device
from adaclip.train_config import TrainConfig
from adaclip.train_device import Place

CPU = torch.device("cpu")


def config(**settings):
    return TrainConfig(**({"epsilon": 3.0, "steps": 2} | settings))


def test_a_cpu_is_left_as_it_was():
    place = Place(config(), CPU)
    assert (place.precision, place.graphed, place.pad_to) == ("fp32", False, None)
    images = torch.ones(2, 3, 4, 4)
    assert place.images(images) is images
    assert place.data(images)[0] is place.here(images) is images
    with place.autocast():
        assert not torch.is_autocast_enabled("cpu")
    with Place(config(precision="bf16"), CPU).autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on cpu, got tf32"):
        Place(config(precision="tf32"), CPU)


@pytest.fixture
def switches():
    """torch's switches for float32 products on a GPU, put back after the test."""
    found = [(b, b.fp32_precision) for b in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    yield
    for backend, before in found:
        backend.fp32_precision = before


@pytest.mark.parametrize(
    ("settings", "graphed", "precision", "cudnn"),
    [
        ({}, True, "tf32", "tf32"),
        ({"graph": False, "precision": "fp32"}, False, "fp32", "ieee"),
        ({"max_batch_size": 16, "precision": "bf16"}, False, "bf16", "tf32"),
    ],
)
def test_a_gpu_gets_graphs_and_tf32_unless_told_otherwise(settings, graphed, precision, cudnn, switches):
    place = Place(config(**settings), torch.device("cuda", 0))
    assert (place.graphed, place.precision) == (graphed, precision)
    assert place.pad_to == ("auto" if graphed else None)
    assert torch.backends.cudnn.conv.fp32_precision == cudnn
    assert place.images(torch.ones(2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)


class GraphsOnTheCPU(Place):
    """As on a GPU, with an emulated graph."""

    def __init__(self, config, device, alone=True):
        super().__init__(config, device, alone)
        self.graphed, self.pad_to = config.graph, "auto"


def test_a_graphed_run_is_the_loops(tmp_path, tiny_run, monkeypatch):
    """From the same key on the same padded batches."""
    monkeypatch.setattr(train_device.GraphedStep, "recorder", Again)
    monkeypatch.setattr("adaclip.train.Place", GraphsOnTheCPU)
    monkeypatch.setattr("adaclip.noise.secrets.token_bytes", lambda n: bytes(range(n)))
    runs = {}
    for graph in (True, False):
        training = tiny_run(
            tmp_path / str(graph),
            graph=graph,
            steps=4,
            clipping="adaptive",
            quantile_noise=10.0,
            groups="report",
        )
        summary = training.run(quiet=True)
        rows = [
            row | dict.fromkeys(("seconds", "images_per_second")) for row in training.folder.read_metrics()
        ]
        runs[graph] = rows, summary["epsilon"], {n: t.clone() for n, t in training.model.state_dict().items()}
    assert runs[True][:2] == runs[False][:2]
    assert all(torch.equal(t, runs[False][2][name]) for name, t in runs[True][2].items())
