#!/usr/bin/env python3
"""How long calls take in a pool whose engines run one image at a time, by a
simulation: calls come at random (Poisson), each image takes the same time, and a
client sends to workers in turn (round_robin) or to any of them (many clients,
each with its own turn). Times are in runs of the model."""

import argparse
import random

LOADS = [0.5, 0.6, 0.7, 0.8, 0.9]
SIZES = [1, 4, 16]
N_CALLS = 400_000


def simulate(n_workers, load, in_turn, chance):
    """Mean and 99th percentile of the time from arrival to answer."""
    free_at = [0.0] * n_workers
    now, took = 0.0, []
    for number in range(N_CALLS):
        now += chance.expovariate(load * n_workers)
        worker = number % n_workers if in_turn else chance.randrange(n_workers)
        free_at[worker] = max(now, free_at[worker]) + 1
        took.append(free_at[worker] - now)
    took = sorted(took[N_CALLS // 10:])
    return sum(took) / len(took), took[len(took) * 99 // 100]


def main():
    parser = argparse.ArgumentParser()
    for name in ("kubectl", "worker", "stubs"):
        parser.add_argument(f"--{name}", help="not needed here")
    parser.parse_args()
    chance = random.Random(1)
    print(f"arithmetic: {N_CALLS} calls each; mean and p99 in runs of the model")
    print("| load | " + " | ".join(
        [f"{n} worker{'s' if n > 1 else ''}, {how}" for how in ("one client in turn", "many clients")
         for n in SIZES if n > 1 or how == "many clients"]) + " |")
    print("|---|" + "---|" * (2 * len(SIZES) - 1))
    for load in LOADS:
        cells = []
        for in_turn in (True, False):
            for n_workers in SIZES:
                if in_turn and n_workers == 1:
                    continue
                mean, p99 = simulate(n_workers, load, in_turn, chance)
                cells.append(f"{mean:.1f}, {p99:.1f}")
        print(f"| {100 * load:.0f} % | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
