"""Private training with PyTorch Lightning: one callback, and the train loader passed through it.

python docs/examples/lightning_mnist.py          # 4,000 MNIST images that come with pip, epsilon 3
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adaclip.data.catalog import load
from adaclip.integrations.lightning import PrivateTraining
from adaclip.models import build


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of privacy."""

    def __init__(self, lr=2.0):
        super().__init__()
        self.net = build("vgg-mini", num_classes=10, in_channels=1, width=8)
        self.lr = lr

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(epochs=5, images=4000, **trainer_options):
    data = load("mnist-mini")
    scale = [(t.float() / 255 - data.mean[0]) / data.std[0] for t in (data.train_images, data.test_images)]
    train = DataLoader(TensorDataset(scale[0][:images], data.train_labels[:images]), batch_size=250)
    test = DataLoader(TensorDataset(scale[1][:images], data.test_labels[:images]), batch_size=500)

    private = PrivateTraining(target_epsilon=3, target_delta=1e-5, epochs=epochs, max_grad_norm=1.0)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[private], **trainer_options)
    trainer.fit(Classifier(), private.loader(train), test)
    print(f"epsilon {private.engine.get_epsilon(1e-5):.3f} at delta 1e-5")
    return trainer, private


if __name__ == "__main__":
    main()
