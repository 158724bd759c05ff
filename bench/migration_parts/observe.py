"""Runs one of Opacus's example scripts as it is, and notes what its engine and optimizer do.

    python observe.py (opacus | adaclip.opacus) OUT [--replay RECORD] -- SCRIPT ARGUMENTS…

adaclip's run comes first: of every step it notes the examples drawn, the parameters and the clipped sum. Opacus's run
gets these examples and these parameters, step by step, so that every clipped sum is of the same numbers, though both
runs add noise of their own. The script knows nothing of it: what make_private returns is watched.
"""

import argparse
import importlib
import runpy
import sys

import torch

DELTA = 1e-5


class Record:
    """What a script did: every step, and the ledger of its last engine. Plain values and tensors only."""

    def __init__(self):
        self.steps, self.engine, self.optimizer, self.parts = [], None, None, []

    def save(self, path):
        history = [tuple(map(float, run)) for run in self.engine.accountant.history]
        torch.save(
            {
                "steps": self.steps,
                "history": history,
                "epsilon": float(self.engine.accountant.get_epsilon(DELTA)),
                "expected_batch_size": float(self.optimizer.expected_batch_size),
            },
            path,
        )


def held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def watch_adaclip(record, optimizer, loader):
    plan, step = loader._plan, optimizer.step
    record.parts.clear()

    def planned(start):
        for part in plan(start):
            record.parts.append(part)
            yield part

    def stepped(*args, **kwargs):
        number = optimizer.batch.step
        drawn = [i for part in record.parts if part.step == number for i in part.indices.tolist()]
        params = held(optimizer)
        before = [p.detach().clone() for p in params]
        scale = optimizer.expected_batch_size
        sums = [torch.zeros_like(p) if p.grad is None else p.grad * scale for p in params]
        norms, bound = optimizer.sample_norms, optimizer.max_grad_norm
        clipped = 0.0 if norms is None else float((norms > bound).double().mean())
        record.steps.append({"indices": drawn, "parameters": before, "sums": sums, "clipped": clipped})
        return step(*args, **kwargs)

    loader._plan, optimizer.step = planned, stepped
    return loader


class Replay:
    """The recorded batches, in place of Opacus's own draws; before each the parameters become the recorded ones."""

    def __init__(self, loader, optimizer, steps):
        self._loader, self._optimizer, self._steps = loader, optimizer, steps

    def __len__(self):
        return len(self._loader)

    def __getattr__(self, name):
        # A second run of the script makes this loader private once more.
        return getattr(self._loader, name)

    @torch.no_grad()
    def _restore(self, step):
        for p, value in zip(held(self._optimizer), step["parameters"], strict=True):
            p.copy_(value)

    def __iter__(self):
        for _ in range(len(self)):
            step = next(self._steps)
            self._restore(step)
            yield self.collate_fn([self.dataset[i] for i in step["indices"]])


def watch_opacus(record, optimizer, loader, recorded):
    step = optimizer.step

    def stepped(*args, **kwargs):
        result = step(*args, **kwargs)
        record.steps.append({"sums": [p.summed_grad.detach().clone() for p in held(optimizer)]})
        return result

    optimizer.step = stepped
    return Replay(loader, optimizer, recorded)


def main():
    own, script = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("package", choices=("opacus", "adaclip.opacus"))
    parser.add_argument("out")
    parser.add_argument("--replay")
    options = parser.parse_args(own)
    recorded = iter(torch.load(options.replay, weights_only=True)["steps"]) if options.replay else None

    record = Record()
    front = importlib.import_module(options.package).PrivacyEngine
    make_private = front.make_private

    def made_private(engine, **arguments):
        module, optimizer, loader = make_private(engine, **arguments)
        record.engine, record.optimizer = engine, optimizer
        if recorded is None:
            return module, optimizer, watch_adaclip(record, optimizer, loader)
        return module, optimizer, watch_opacus(record, optimizer, loader, recorded)

    front.make_private = made_private
    sys.argv = script
    torch.manual_seed(0)
    runpy.run_path(script[0], run_name="__main__")
    record.save(options.out)


if __name__ == "__main__":
    main()
