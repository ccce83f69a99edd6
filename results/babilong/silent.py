"""
What a book does to a memory that has nothing to learn from it: tell a model of qa1 who is where, let it read,
and ask on the way. Prints, after 1, 2, 4, ... thousand segments: how far the memory has moved from what was
told, relative to its size; the share of segments that changed it in any bit; and how many of the questions
are answered correctly.

    python results/babilong/silent.py out/forget data/books/pride_and_prejudice.txt
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import torch                                                              # noqa: E402
from tqdm import tqdm                                                     # noqa: E402

import train                                                              # noqa: E402
from armt import state_map, tensors                                       # noqa: E402
from data import babi, fill, make_task, segments                          # noqa: E402
from data.files import one_line_errors, read_text                         # noqa: E402


@torch.no_grad()
def read_on(folder, book, rows=50, thousands=16):
    """One JSON line for each point: 50 stories of six facts, the same book behind each."""
    c, model, _ = train.load(folder)
    task, dice, T = make_task(c), random.Random("silent"), c.align or c.segment_len
    stories = [task.story(dice, "qa1", 6) for _ in range(rows)]
    pad = lambda text: task.words.pad(task.words.encode(text), c.align)
    told = torch.from_numpy(segments([pad(" ".join(facts)) for facts, _ in stories], T))
    text = segments([pad(read_text(book))], T)[0]                                                # (S, T)
    asked = [(row, task.ask(q), task.words.id(a)) for row, (_, found) in enumerate(stories) for q, a in found
             if q.startswith("Where is") and "the" not in q and a != babi.UNKNOWN]
    row, questions = torch.tensor([r for r, _, _ in asked]), torch.from_numpy(fill([q for _, q, _ in asked]))
    right, state, wrote = torch.tensor([a for _, _, a in asked]), model.init_state(rows), 0
    for segment in told.unbind(1):
        _, state = model.memory(model.wte(segment), state)
    start = state
    for i in tqdm(range(1000 * thousands + 1), desc=Path(folder).name, leave=False):
        if i % 1000 == 0 and i // 1000 & (i // 1000 - 1) == 0:
            logits, _, _ = model(questions, state=state_map(lambda s: s[row], state))
            size, moved = (sum(x.square().sum().item() for x in tensors(s)) ** 0.5
                           for s in (start, state_map(torch.sub, state, start)))
            correct = logits[:, -1].argmax(-1) == right
            print(json.dumps(dict(run=Path(folder).name, segments=i,
                                  moved=round(moved / max(size, 1e-9), 4),
                                  wrote=round(wrote / max(1, i * rows), 5),
                                  accuracy=round(correct.float().mean().item(), 4))), flush=True)
        segment = torch.from_numpy(text[i % len(text)]).expand(rows, -1)
        _, new = model.memory(model.wte(segment), state_map(torch.clone, state))
        changed = [(a != b).flatten(1).any(1) for a, b in zip(tensors(state), tensors(new))]
        wrote, state = wrote + (int(torch.stack(changed).any(0).sum()) if changed else 0), new


if __name__ == "__main__":
    with one_line_errors("silent.py"):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        for path in sorted(Path(sys.argv[1]).glob("*/config.json")):
            read_on(path.parent, sys.argv[2])
