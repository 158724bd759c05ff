"""The optimizer step on VGG-11's 9.2 million parameters: noise and update in one pass, beside torch.

    python bench/bench_noisy_step.py [--rounds 15] [--threads N]

For each optimizer: ours; torch.randn noise added to the gradients, then torch's step; torch's step alone, which
is what training without privacy pays. Checked against torch without noise and for the noise itself, then timed
in turn in one process; ratios are theirs over ours, pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics

import pytest
import torch
from torch import nn

from adaclip.benchmark import alternate, median_ratio
from adaclip.noise import NoiseSource
from adaclip.update import noisy_update

CHANNELS = [3, 64, 128, 256, 256, 512, 512, 512, 512]
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


class Case:
    def __init__(self, name: str, channels: list[int] = CHANNELS, device: str = "cpu", backend: str = "auto"):
        generator = torch.Generator().manual_seed(0)
        shapes = [s for a, b in itertools.pairwise(channels) for s in ((b, a, 3, 3), (b,))]
        shapes += [(10, channels[-1]), (10,)]
        self.params = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        self.name, self.backend = name, backend
        self.optimizer = OPTIMIZERS[name](self.params)
        self.source = NoiseSource()
        self.released = 0

    def ours(self, std: float = 1e-2) -> None:
        stds = [std] * len(self.params)
        noisy_update(self.optimizer, self.params, stds, self.source, self.released, backend=self.backend)
        self.released += 1

    def noise_then_step(self) -> None:
        for p in self.params:
            p.grad.add_(torch.randn_like(p), alpha=1e-2)
        self.optimizer.step()

    def step_alone(self) -> None:
        self.optimizer.step()

    @torch.no_grad()
    def check(self) -> None:
        """Raise AssertionError unless ours is torch's step on the gradient plus the noise."""
        twins = [nn.Parameter(p.clone()) for p in self.params]
        optimizer = OPTIMIZERS[self.name](twins)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        first = 0
        for p, t in zip(self.params, twins, strict=True):
            t.grad = self.source.normal_(p.grad.clone(), self.released, std=1e-2, first_chunk=first, add=True)
            first += -(-p.numel() // 160)
        optimizer.step()
        self.ours()
        for p, t in zip(self.params, twins, strict=True):
            assert float((p - t).norm() / t.norm()) < 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, ms: median (least); ratios to ours")
    print(f"{'':14}{'ours':>16}{'randn + step':>18}{'step alone':>18}  {'randn + step':24}step alone")
    for name in OPTIMIZERS:
        case = Case(name)
        case.check()
        calls = {"ours": case.ours, "randn + step": case.noise_then_step, "step alone": case.step_alone}
        times = alternate(calls, args.rounds)
        ours, both, alone = (
            f"{1e3 * statistics.median(t):7.2f} ({1e3 * min(t):6.2f})" for t in times.values()
        )
        to_both = str(median_ratio(times["randn + step"], times["ours"]))
        to_alone = median_ratio(times["step alone"], times["ours"])
        print(f"{name:14}{ours:>16}{both:>18}{alone:>18}  {to_both:24}{to_alone}")


@pytest.mark.parametrize("what", ["ours", "noise_then_step", "step_alone"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, name, what):
    case = Case(name)
    case.check()
    benchmark.group = f"{name}, 9.2 M parameters"
    benchmark.pedantic(getattr(case, what), rounds=7, warmup_rounds=1)


if __name__ == "__main__":
    main()
