"""The transforms that the examples name, with torchvision's meaning."""

import numpy as np
import torch
from PIL import ImageOps


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    """PIL image -> float32 [C, H, W] in 0 … 1."""

    def __call__(self, image):
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def __call__(self, image):
        return (image - self.mean) / self.std


class RandomHorizontalFlip:
    def __init__(self, p=0.5):
        self.p = p

    def __call__(self, image):
        return ImageOps.mirror(image) if torch.rand(1).item() < self.p else image


class RandomCrop:
    def __init__(self, size, padding=0):
        self.size, self.padding = size, padding

    def __call__(self, image):
        image = ImageOps.expand(image, self.padding)
        x, y = (int(torch.randint(side - self.size + 1, (1,))) for side in image.size)
        return image.crop((x, y, x + self.size, y + self.size))


__all__ = ["Compose", "Normalize", "RandomCrop", "RandomHorizontalFlip", "ToTensor"]
