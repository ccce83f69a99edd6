"""
What a book does to a memory that has nothing to learn from it: tell models of qa1 who is where, let them read
on, and ask on the way. Prints a JSON line for each point, after 0, 1, 2, 4, ... segments of the book:

    moved      how far the memory is from what was told, relative to its size
    wrote      the share of segments so far that changed the memory in any bit
    accuracy   of the questions where each person is

    python results/forget/forget.py out/forget data/books/pride_and_prejudice.txt > out/forget.jsonl
    python results/forget/forget.py results/forget/read.jsonl      the table of such lines
"""
import json
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import torch                                                              # noqa: E402
from tqdm import tqdm                                                     # noqa: E402

import train                                                              # noqa: E402
from armt import state_map, tensors                                       # noqa: E402
from data import babi, fill, make_task, segments                          # noqa: E402
from data.files import one_line_errors, read_text                         # noqa: E402
from results.table import mean_of                                         # noqa: E402
from sample import changed                                                # noqa: E402


def size(state):
    """The length of a state, taken as one vector."""
    return sum(x.square().sum().item() for x in tensors(state)) ** 0.5


@torch.no_grad()
def read_on(folder, book):
    """50 stories of six facts, the same 2^14 segments of a book behind each."""
    rows, most = 50, 2 ** 14
    c, model, _ = train.load(folder)
    task, dice, T = make_task(c), random.Random("silent"), c.segment_len
    if task.kind != "qa":
        raise ValueError(f"{folder}: {c.task} is not told anything")
    stories = [task.story(dice, "qa1", 6) for _ in range(rows)]
    told = torch.from_numpy(segments([sum(task.tell(facts, task.align), []) for facts, _ in stories], T))
    text = torch.from_numpy(segments([task.words.pad(task.words.encode(read_text(book)), task.align)], T)[0])
    asked = [(row, task.ask(q), task.words.id(a)) for row, (_, found) in enumerate(stories) for q, a in found
             if q.startswith("Where is") and "the" not in q and a != babi.UNKNOWN]
    row, questions = torch.tensor([r for r, _, _ in asked]), torch.from_numpy(fill([q for _, q, _ in asked]))
    right, wrote = torch.tensor([a for _, _, a in asked]), 0
    start = state = model(told.flatten(1))[2]
    left_out = "decoys" if not c.decoys else "muon" if not c.muon_lr else c.ablate
    for i in tqdm(range(most + 1), desc=Path(folder).name, leave=False):
        if i & (i - 1) == 0:                                                     # 0, 1, 2, 4, ...
            logits, _, _ = model(questions, state=state_map(lambda s: s[row], state))
            correct = logits[:, -1].argmax(-1) == right
            print(json.dumps(dict(
                run=Path(folder).name, rule=c.rule or c.memory, gate=c.gate or "-", ablate=left_out,
                price=c.price, seed=c.seed, segments=i,
                moved=round(size(state_map(torch.sub, state, start)) / (size(start) or 1.0), 4),
                wrote=round(wrote / max(1, i * rows), 5),
                accuracy=round(correct.float().mean().item(), 4))), flush=True)
        _, _, new = model(text[i % len(text)].expand(rows, -1), state=state)
        wrote, state = wrote + sum(changed(state, new, rows)), new


def print_table(file):
    """Accuracy in per cent after so many segments, over seeds; medians of the rest at the last point."""
    kinds, points = {}, (0, 64, 1024, 4096, 16384)
    for row in map(json.loads, read_text(file).splitlines()):
        kind = row["rule"], row["ablate"].replace("nothing", "-"), row["gate"], f"{row['price']:g}"
        kinds.setdefault(kind, {}).setdefault(row["segments"], []).append(row)
    print(f"{'rule':11}{'ablate':9}{'gate':13}price  seeds" + "".join(f"{n:13,}" for n in points)
          + "    moved    wrote")
    for kind, at in kinds.items():
        if points[-1] not in at:
            raise ValueError(f"{file}: {' '.join(kind)} ends before {points[-1]:,} segments")
        moved, wrote = (statistics.median(row[x] for row in at[points[-1]]) for x in ("moved", "wrote"))
        print(f"{kind[0]:11}{kind[1]:9}{kind[2]:13}{kind[3]:>5}{len(at[0]):7}"
              + "".join(mean_of(at[n]).rjust(13) for n in points) + f"{moved:9.2g}{100 * wrote:8.1f}%")


if __name__ == "__main__":
    with one_line_errors("forget.py"):
        if sys.argv[1:] and sys.argv[1].endswith(".jsonl"):
            sys.exit(print_table(sys.argv[1]))
        if len(sys.argv) < 3:
            sys.exit(__doc__)
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        runs = sorted(Path(sys.argv[1]).glob("**/config.json"))
        if not runs:
            raise ValueError(f"there is no run in {sys.argv[1]}")
        for path in runs:
            read_on(path.parent, sys.argv[2])
