"""Private training with Hugging Face Accelerate: `prepare` of adaclip in the place of the accelerator's.

python docs/examples/accelerate_mnist.py         # 4,000 MNIST images that come with pip, epsilon 3
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine
from adaclip.data.catalog import load
from adaclip.integrations.accelerate import prepare
from adaclip.models import build


def main(epochs=5, images=4000, **accelerator_options):
    data = load("mnist-mini")
    x = (data.train_images.float() / 255 - data.mean[0]) / data.std[0]
    loader = DataLoader(TensorDataset(x[:images], data.train_labels[:images]), batch_size=250)
    model = build("vgg-mini", num_classes=10, in_channels=1, width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    accelerator = Accelerator(**accelerator_options)
    engine = PrivacyEngine()
    model, optimizer, loader = prepare(
        accelerator,
        engine,
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=3,
        target_delta=1e-5,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    steps = epochs * len(loader)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))

    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            scheduler.step()
        accelerator.print(f"epsilon {engine.get_epsilon(1e-5):.3f} at delta 1e-5")
    return engine, accelerator, optimizer


if __name__ == "__main__":
    main()
