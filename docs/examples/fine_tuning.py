"""Fine-tuning a pretrained network with BatchNorm: first its head, then all of it, each part clipped to its own norm.

    python docs/examples/fine_tuning.py              # 4,000 MNIST images that come with pip

The network is "pretrained" here on the test images, which play the public data.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip import PrivacyEngine, fix
from adaclip.data.catalog import load


def network():
    return nn.Sequential(
        nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(
                nn.Conv2d(16, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.ReLU(inplace=True),
                nn.AdaptiveAvgPool2d(2),
            ),
        ),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def pretrained(x, y, epochs):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def accuracy(model, x, y):
    model.eval()
    with torch.no_grad():
        found = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return found


def main(epochs=2, images=4000):
    data = load("mnist-mini")
    x, public = (
        (t.float() / 255 - data.mean[0]) / data.std[0] for t in (data.train_images, data.test_images)
    )
    x, y = x[:images], data.train_labels[:images]
    start = pretrained(public[:images], data.test_labels[:images], epochs)

    # Exactly what the network computes in evaluation mode: its statistics are of public data, and stay.
    model = fix(start, batch_norm="frozen")
    body, head = model[0], model[2]
    body.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [
            {"params": head.parameters(), "lr": 0.5, "max_grad_norm": 1.0},
            {"params": body.parameters(), "lr": 0.1, "max_grad_norm": 0.3},
        ]
    )
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=200),
        target_epsilon=3,
        target_delta=1e-5,
        epochs=2 * epochs,
    )
    before = accuracy(model, x, y)
    for epoch in range(2 * epochs):
        # The frozen body costs no per-sample work; from here on it is trained as well.
        body.requires_grad_(epoch >= epochs)
        for a, b in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            optimizer.step()
    after = accuracy(model, x, y)
    print(f"accuracy {before:.3f}, then {after:.3f} at epsilon {engine.get_epsilon(1e-5):.2f}, delta 1e-5")
    return engine, before, after


if __name__ == "__main__":
    main()
