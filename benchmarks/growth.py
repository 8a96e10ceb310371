"""Figures of how seconds and memory grow with the size of the group and the lengths of prompt and responses."""
import time
from dataclasses import dataclass

import matplotlib
import tyro
from harness import Options, clock, make_policy, make_prompt, make_rollout, save, show
from repeated_vs_packed import make_sides, measure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

AXES = {"G": "responses in a group", "P": "prompt tokens", "C": "tokens of a response"}
LABELS = {"repeated": "G whole rows (transformers)", "packed": "one packed row (ours)"}


@dataclass
class Settings(Options):
    "Growth with G, P and C, one at a time."
    repeats: int = 1  # number of times that each side is timed; the sides take turns
    prompt_length: int = 712  # P where G or C grows
    length: int = 128  # C where G or P grows
    group_size: int = 8  # G where P or C grows
    group_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)  # values of G
    prompt_lengths: tuple[int, ...] = (145, 388, 712, 1400)  # values of P: 2, 8, 16 and 32 frames
    lengths: tuple[int, ...] = (16, 128, 256, 512)  # values of C

    def __post_init__(self):
        super().__post_init__()
        if self.quick:
            self.prompt_length, self.length, self.group_size = 30, 6, 2
            self.group_sizes, self.prompt_lengths, self.lengths = (1, 2), (30, 50), (3, 6)

    def cases(self) -> dict[str, list[tuple[int, int, int]]]:
        "(P, C, G) along each axis."
        return {"G": [(self.prompt_length, self.length, g) for g in self.group_sizes],
                "P": [(p, self.length, self.group_size) for p in self.prompt_lengths],
                "C": [(self.prompt_length, c, self.group_size) for c in self.lengths]}


def draw(lines: dict[str, list[dict]], settings: Settings) -> str:
    "Writes growth.png: seconds above, memory below, one column for each axis; returns its name."
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", layout="constrained")
    seconds = "CPU seconds" if settings.device == "cpu" else "seconds"
    for column, (axis, cases) in zip(axes.T, lines.items()):
        for panel, key, label in zip(column, (clock(settings), "peak_mib"), (seconds, "MiB")):
            for side, name in LABELS.items():
                values = [case["sides"][side][key] for case in cases]
                if None not in values:
                    panel.plot([case[axis] for case in cases], values, "o-", ms=4, label=name)
            panel.set_ylim(bottom=0)
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        column[1].set_xlabel(f"{axis}, {AXES[axis]}")
        fixed = dict(P=settings.prompt_length, C=settings.length, G=settings.group_size)
        column[0].set_title(", ".join(f"{k} = {v}" for k, v in fixed.items() if k != axis), fontsize=10)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Forward and backward: time and peak memory", fontsize=11)
    figure.savefig(settings.out / "growth.png", dpi=100)
    plt.close(figure)
    return "growth.png"


def main(settings: Settings) -> None:
    started = time.perf_counter()
    policy, small = make_policy(settings), dict(side=2, words=10) if settings.quick else {}
    for run in make_sides(policy, make_rollout(policy, make_prompt(policy, 30, side=2, words=10), 2, 4)).values():
        run()  # loads libraries and makes the gradients
    lines = settings.cases()
    sizes = sorted({size for sizes in lines.values() for size in sizes})
    rollouts = [make_rollout(policy, make_prompt(policy, length, **small), groups, n_tokens) for length, n_tokens, groups in sizes]
    known = dict(zip(sizes, measure(policy, rollouts, settings, ("repeated", "packed"))))
    cases = {axis: [known[size] for size in sizes] for axis, sizes in lines.items()}
    columns = ["P", "C", "G", "repeated s", "packed s", "faster", "repeated MiB", "packed MiB"]
    table = [[case["P"], case["C"], case["G"], *(case["sides"][side][clock(settings)] for side in LABELS), case["speedup"],
              *(case["sides"][side]["peak_mib"] for side in LABELS)] for case in known.values()]
    show("Growth, forward and backward", columns, table)
    settings.out.mkdir(parents=True, exist_ok=True)
    figure = draw(cases, settings)
    print(save("growth", settings, list(known.values()), figure=figure), f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings))
