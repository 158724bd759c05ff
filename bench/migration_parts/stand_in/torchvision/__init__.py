"""A stand-in for torchvision, as much of it as Opacus's MNIST and CIFAR-10 examples touch.

torchvision pins one build of torch and cannot be installed beside every other. `bench/migration.py` puts this folder on
the path of both runs, of Opacus and of adaclip: images come from local files in the official formats, through
`adaclip.data`, the first ADACLIP_MIGRATION_TRAIN and ADACLIP_MIGRATION_TEST of them.
"""

from torchvision import datasets, transforms

__all__ = ["datasets", "transforms"]
