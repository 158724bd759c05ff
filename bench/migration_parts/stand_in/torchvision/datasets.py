"""MNIST and CIFAR10 with torchvision's arguments; examples are PIL images and ints before the transform."""

import os

from PIL import Image
from torch.utils.data import Dataset

from adaclip.data import load


class _Images(Dataset):
    name: str

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        # Never downloaded here: what is compared shall be the same files.
        data = load(self.name, data_dir=root)
        split = "train" if train else "test"
        count = int(os.environ[f"ADACLIP_MIGRATION_{split.upper()}"])
        self.data = getattr(data, f"{split}_images")[:count]
        self.targets = getattr(data, f"{split}_labels")[:count].tolist()
        self.transform, self.target_transform = transform, target_transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        pixels = self.data[index]
        image = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())
        target = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class MNIST(_Images):
    name = "mnist"


class CIFAR10(_Images):
    name = "cifar10"
