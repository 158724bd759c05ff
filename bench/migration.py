"""Opacus's own MNIST and CIFAR-10 examples, with the import lines changed alone, beside the originals.

    python -m bench.migration --data DATA [--examples OPACUS/examples] [--out FILE.json]

Without --examples the two scripts are downloaded, at the commit and with the hashes below; nothing of them is kept.
DATA holds MNIST and CIFAR-10 in their official formats (`mnist/`, `cifar-10-batches-bin/`). Needs opacus and tqdm.

Each script runs twice, in processes of its own, on the first images of the real data: the copy, whose lines
`from opacus…` and `import opacus…` name adaclip.opacus instead, and the original on Opacus. In place of torchvision both
get `migration_parts/stand_in`. `migration_parts/observe.py` watches both. What "the same" means:

* the privacy ledger: equal noise multipliers, sampling rates and numbers of steps;
* epsilon by RDP: adaclip's at Opacus's orders equals Opacus's figure to 1e-9 of it;
* epsilon by PRV, the scripts' accountant: adaclip's certified bounds lie between the lower and the upper bound that
  Opacus's PRV gives (0.01 on each side of its estimate; what it reports is the upper one);
* the clipped sum of every step, on the same examples and parameters: equal to a relative 1e-5 in norm;
* the public denominator of every step.

Exits with 1 if something is not the same.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pooch
import torch

PARTS = Path(__file__).parent / "migration_parts"
# Opacus 1.6.0.
SOURCE = (
    "https://raw.githubusercontent.com/meta-pytorch/opacus/ee79782e5478ccf0435154659c08938bdd3ba4ca/examples/"
)
SHA256 = {
    "mnist.py": "14e9a51180f52ea05029e803f0ab8a172910142cf256ba0e24be15011b1fbcf7",
    "cifar10.py": "5240c637f32fe8cb1ee3dc3fa2bc1b6685cc01b8e05b0152b6911c56031d447a",
}
TRAIN, TEST = 1000, 200
RUNS = {
    "mnist": ["mnist.py", "--device=cpu", "--batch-size=64", "--epochs=2"],
    "mnist, two runs": ["mnist.py", "--device=cpu", "--batch-size=100", "--epochs=1", "--n-runs=2", "-c=6"],
    "cifar10": ["cifar10.py", "--workers=0", "--batch-size=90", "--epochs=2", "-c=5"],
    "cifar10, per layer": [
        "cifar10.py",
        "--workers=0",
        "--batch-size=90",
        "--epochs=1",
        "--max-per-sample-grad_norm=1",
        "--clip_per_layer",
    ],
}
_IMPORT = re.compile(r"^(\s*)(?:from\s+opacus\b|import\s+opacus\b)")


def rewrite_imports(text):
    """`text` with adaclip.opacus where a line imports from opacus. No other line is touched."""
    return "".join(_rewritten(line) if _IMPORT.match(line) else line for line in text.splitlines(True))


def _rewritten(line):
    plain = re.match(r"^(\s*)import\s+opacus(\s*(?:#.*)?\n?)$", line)
    if plain:
        return f"{plain[1]}import adaclip.opacus as opacus{plain[2]}"
    if re.match(r"^\s*import\s+opacus(?!\S*\s+as\s)", line):
        raise ValueError(f"an import of a submodule must be by `from` or with `as`, got {line.strip()!r}")
    return re.sub(r"^(\s*(?:from|import)\s+)opacus\b", r"\1adaclip.opacus", line)


def examples(folder):
    """The two scripts' texts, by name."""
    if folder is None:
        return {
            name: Path(pooch.retrieve(SOURCE + name, f"sha256:{digest}")).read_text(encoding="utf-8")
            for name, digest in SHA256.items()
        }
    return {name: (Path(folder) / name).read_text(encoding="utf-8") for name in SHA256}


def observe(package, script, arguments, folder, replay=None):
    """Run a script and return what `observe.py` noted."""
    out = folder / f"{package}.pt"
    path = [str(PARTS / "stand_in"), *filter(None, [os.environ.get("PYTHONPATH")])]
    limits = {"ADACLIP_MIGRATION_TRAIN": str(TRAIN), "ADACLIP_MIGRATION_TEST": str(TEST)}
    done = subprocess.run(
        [
            sys.executable,
            str(PARTS / "observe.py"),
            package,
            str(out),
            *([] if replay is None else ["--replay", str(replay)]),
            "--",
            str(script),
            *arguments,
        ],
        cwd=folder,
        env=os.environ | limits | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{script.name} on {package} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return out, torch.load(out, weights_only=True)


def compare(name, arguments, text, data):
    """Run one example both ways; what came out, as plain numbers."""
    arguments = [*arguments, f"--data-root={data}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original, copy = folder / "original.py", folder / "copy.py"
        original.write_text(text, encoding="utf-8")
        copy.write_text(rewrite_imports(text), encoding="utf-8")
        record, ours = observe("adaclip.opacus", copy, arguments, folder)
        _, theirs = observe("opacus", original, arguments, folder, replay=record)
    return {"run": name, **epsilons(ours, theirs), **gradients(ours, theirs)}


def epsilons(ours, theirs, delta=1e-5):
    from opacus.accountants import PRVAccountant, RDPAccountant

    from adaclip.accounting import create_accountant
    from adaclip.opacus import accountants

    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(sigma, q, int(steps)) for sigma, q, steps in theirs["history"]]
    lower, estimate, upper = prv._get_dprv(0.01, delta / 1000).compute_epsilon(delta, delta / 1000, 0.01)
    own, pld = accountants.RDPAccountant(), create_accountant("pld")
    own.history = [(sigma, q, int(steps)) for sigma, q, steps in ours["history"]]
    for sigma, q, steps in own.history:
        pld.step(q, sigma, steps)
    found = rdp.get_epsilon(delta)
    same = own.get_epsilon(delta, alphas=rdp.DEFAULT_ALPHAS)
    bounds = pld.epsilon_bounds(delta)
    return {
        "steps": int(sum(steps for _, _, steps in ours["history"])),
        "ledgers equal": ours["history"] == theirs["history"],
        "rdp": {"opacus": found, "adaclip": same, "same": abs(same - found) <= 1e-9 * found},
        "prv": {
            "opacus": [float(lower), float(estimate), float(upper)],
            "opacus reported": theirs["epsilon"],
            "adaclip": list(bounds),
            "adaclip reported": ours["epsilon"],
            "same": bool(lower <= bounds[0] and bounds[1] <= upper and ours["epsilon"] == bounds[1]),
        },
    }


def gradients(ours, theirs):
    if len(ours["steps"]) != len(theirs["steps"]):
        raise RuntimeError(f"adaclip made {len(ours['steps'])} steps, Opacus {len(theirs['steps'])}")
    worst = 0.0
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        mine, other = (torch.cat([t.flatten().double() for t in side["sums"]]) for side in (a, b))
        worst = max(worst, float((mine - other).norm() / other.norm().clamp_min(1e-12)))
    rows = [len(step["indices"]) for step in ours["steps"]]
    return {
        "denominators": [ours["expected_batch_size"], theirs["expected_batch_size"]],
        "batches": [min(rows), max(rows)],
        "share of samples clipped": [f(step["clipped"] for step in ours["steps"]) for f in (min, max)],
        "clipped sum": {"steps compared": len(rows), "largest relative error": worst, "same": worst <= 1e-5},
    }


def passed(result):
    return (
        result["ledgers equal"]
        and result["rdp"]["same"]
        and result["prv"]["same"]
        and result["clipped sum"]["same"]
        and len(set(result["denominators"])) == 1
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("ADACLIP_DATA"), help="default: $ADACLIP_DATA")
    parser.add_argument("--examples", help="Opacus's folder `examples`; without it they are downloaded")
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data or ADACLIP_DATA must name the folder of the data sets")
    texts = examples(options.examples)
    results = []
    for name, (script, *flags) in RUNS.items():
        root = Path(options.data).resolve() / ("mnist" if script == "mnist.py" else "")
        result = compare(name, flags, texts[script], root)
        results.append(result)
        reported = result["prv"]["adaclip reported"], result["prv"]["opacus reported"]
        print(
            f"{name}: {'the same' if passed(result) else 'NOT THE SAME'}; {result['steps']} steps, PRV epsilon "
            f"{reported[0]:.6f} (Opacus {reported[1]:.6f}), RDP {result['rdp']['adaclip']:.9f} "
            f"({result['rdp']['opacus']:.9f}), clipped sums {result['clipped sum']['largest relative error']:.1e} apart, "
            f"denominators {result['denominators']}",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(map(passed, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
