"""Networks of timm, where it imports (it needs torchvision): fixed, and clipped sample by sample."""

import pytest
import torch

from adaclip import fix, validate
from adaclip.testing import clipped_sum, private_step, relative_error, sample_grads, square_loss

timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)

MODELS = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8},
}


@pytest.mark.filterwarnings("ignore:adaclip has no fast", "ignore:There is a performance drop")
@pytest.mark.parametrize("batch_norm", ["group", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_of_timm(name, batch_norm):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **MODELS[name])
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32) * 2 + 0.5)
    fixed = fix(model, batch_norm=batch_norm)
    assert validate(fixed) == []
    x, y = torch.randn(3, 3, 32, 32), torch.randn(3, 3)
    if batch_norm == "frozen":
        assert torch.equal(fixed.eval()(x), model.eval()(x))
    fixed.train()
    sums, _ = private_step(fixed, x, y, square_loss, max_grad_norm=0.5)
    truth = clipped_sum(sample_grads(fixed, x, y, square_loss), 0.5)
    for parameter, t in truth.items():
        assert relative_error(sums[parameter], t) < 1e-3, parameter
