"""`adaclip audit`: does the engine of this installation keep the privacy it claims?"""

from __future__ import annotations

import argparse
import math
from functools import partial

_METHODS = ("component", "one-run", "two-run")
_CLIPPING = ("flat", "per_layer", "adaptive", "automatic", "psac", "dc_sgd")
_FOLLOWING = ("adaptive", "dc_sgd")
_CANARIES = {"component": 500, "one-run": 1000, "two-run": 200}


def add_audit_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``audit`` command; ``args.run(args)`` runs it and returns the exit code."""
    parser = subparsers.add_parser(
        "audit",
        help="measure whether the engine keeps the privacy it claims",
        description="Runs the real engine, sampler and optimizer on canaries whose gradients are known, measures "
        "noise, contributions and sampling, and compares what they prove about epsilon with what is claimed. "
        "Exit code 0: nothing contradicts the claim; 1: flagged; 2: the arguments are at fault.",
    )
    parser.add_argument(
        "--method",
        choices=_METHODS,
        default="component",
        help="component (default): measure noise, contribution and rate, a sharp bound in seconds; one-run: guess "
        "which half of the canaries trained along; two-run: train with and without canaries, many times",
    )
    parser.add_argument("--epsilon", type=float, default=3.0, help="the claim to be audited (default 3)")
    parser.add_argument("--delta", type=float, default=1e-5, help="default 1e-5")
    parser.add_argument(
        "--steps", type=int, default=1000, metavar="T", help="steps of training (default 1000)"
    )
    parser.add_argument(
        "--canaries",
        type=int,
        metavar="M",
        help="default " + ", ".join(f"{n} for {method}" for method, n in _CANARIES.items()),
    )
    parser.add_argument(
        "--runs", type=int, metavar="R", help="trainings per world, two-run only (default 20)"
    )
    parser.add_argument(
        "--sample-rate",
        type=float,
        default=0.1,
        metavar="Q",
        help="expected batch size / examples (default 0.1)",
    )
    parser.add_argument("--max-grad-norm", type=float, default=2.0, metavar="C", help="default 2")
    parser.add_argument(
        "--clipping",
        choices=_CLIPPING,
        default="flat",
        help="default flat; where C follows the norms, two more examples of ordinary norms join every canary",
    )
    parser.add_argument(
        "--groups", type=int, metavar="G", help="release the noisy statistics of so many label groups, too"
    )
    parser.add_argument(
        "--side-trials",
        type=int,
        default=2000,
        metavar="N",
        help="single steps that judge what is released beside the gradient, component only (default 2000)",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the lower bound (default 0.95)")
    parser.add_argument(
        "--accountant", default="pld", help="of the claim and of the lower bound (default pld)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the canaries; noise and batches keep the engine's secret key"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_audit)


def run_audit(args: argparse.Namespace) -> int:
    """Audit and print; returns 0 if the engine passes, 1 if it is flagged.

    Raises:
        ValueError, TypeError: an argument out of range.
    """
    from adaclip.accounting import calibrate_noise

    canaries = _CANARIES[args.method] if args.canaries is None else args.canaries
    if canaries < 1:
        raise ValueError(f"--canaries must be at least 1, got {canaries}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if args.runs is not None and args.method != "two-run":
        raise ValueError(f"--runs is for --method two-run, got --method {args.method}")
    if not 0.0 < args.sample_rate <= 1.0:
        raise ValueError(f"--sample-rate must be in (0, 1], got {args.sample_rate!r}")
    if args.groups is not None and args.groups < 1:
        raise ValueError(f"--groups must be at least 1, got {args.groups}")
    if args.side_trials < 1:
        raise ValueError(f"--side-trials must be at least 1, got {args.side_trials}")
    # Canaries are longer than C wherever it goes, so others must keep it down. And the rate is a whole batch
    # over a whole data set: fill up to where a batch holds one example.
    size = canaries * (3 if args.clipping in _FOLLOWING else 1)
    size = max(size, math.ceil(1.0 / args.sample_rate))
    batch_size = max(1, round(args.sample_rate * size))
    sigma = calibrate_noise(
        target_epsilon=args.epsilon,
        delta=args.delta,
        sample_rate=batch_size / size,
        steps=args.steps,
        accountant=args.accountant,
    )
    # After the cheap checks: torch takes seconds to import.
    import torch
    from rich.console import Console

    from adaclip.auditing import EngineStep, component_audit, one_run_audit, two_run_audit

    # Steps of so few parameters are fastest in one thread.
    torch.set_num_threads(1)
    build = partial(
        EngineStep,
        noise_multiplier=sigma,
        sample_rate=batch_size / size,
        accountant=args.accountant,
        **_releases(args, sigma, batch_size),
    )
    common = {
        "steps": args.steps,
        "delta": args.delta,
        "canaries": canaries,
        "background": size - canaries,
        "max_grad_norm": args.max_grad_norm,
        "confidence": args.confidence,
        "seed": args.seed,
    }
    if args.method == "component":
        report = component_audit(build, accountant=args.accountant, side_trials=args.side_trials, **common)
    elif args.method == "one-run":
        report = one_run_audit(build, accountant=args.accountant, **common)
    else:
        report = two_run_audit(build, runs=20 if args.runs is None else args.runs, **common)
    if args.json:
        print(report.to_json())
    else:
        Console().print(report)
    return 0 if report.passed else 1


def _releases(args: argparse.Namespace, sigma: float, batch_size: int) -> dict[str, object]:
    """What of `EngineStep`'s arguments says what a step releases.

    The strategies' usual noise, as a number: the audit's small data sets share it. Where the usual one would
    leave too little of sigma for the gradient, more.
    """
    from adaclip.clipping import AdaptiveClipping, DCSGDClipping
    from adaclip.groups import LabelGroups

    made: dict[str, object] = {"max_grad_norm": args.max_grad_norm, "clipping": args.clipping}
    if args.clipping == "adaptive":
        clipping = AdaptiveClipping(args.max_grad_norm, sigma_b=max(batch_size / 20, sigma))
        made = {"max_grad_norm": None, "clipping": clipping}
    if args.clipping == "dc_sgd":
        # Few bins: each is a check of its own.
        noise = max(8.0, batch_size / 50, 2 * sigma)
        clipping = DCSGDClipping(args.max_grad_norm, bins=20, sigma_h=noise)
        made = {"max_grad_norm": None, "clipping": clipping}
    if args.groups is not None:
        noise = max(40.0, 3 * sigma)
        made["groups"] = LabelGroups(groups=args.groups, sigma_s=noise, sigma_n=noise)
    return made
