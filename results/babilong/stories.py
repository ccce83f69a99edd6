"""
Is it a reader, or a player of bAbI? Tell a model simulated stories of one to six facts, 200 of each task, and
ask everything that can be asked about people, things and places. Prints how many of the questions that the
text answers, and of those that it does not, get the right answer.

    python results/babilong/stories.py data/pretrained
"""
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import torch                                                              # noqa: E402
from tqdm import tqdm                                                     # noqa: E402

import train                                                              # noqa: E402
from armt import state_map                                                # noqa: E402
from data import babi, fill, make_task, segments                          # noqa: E402
from data.files import one_line_errors                                    # noqa: E402


@torch.no_grad()
def ask_everything(folder):
    """Print a line for what is known and one for what is not."""
    c, model, _ = train.load(folder)
    task, dice, T, marks = make_task(c), random.Random("stories"), c.segment_len, []
    if task.kind != "qa":
        raise ValueError(f"{folder}: {c.task} is not told anything")
    for part, i in tqdm([*itertools.product(babi.TASKS, range(200))], leave=False):
        events = list(itertools.islice(babi.world(dice, part), 1 + i % 6))
        told = segments([sum(task.tell([event.text for event in events], task.align), [])], T)
        _, _, state = model(torch.from_numpy(told).flatten(1))
        pairs = [pair for asked in babi.everything(events).values() for pair in asked.items()]
        questions = torch.from_numpy(fill([task.ask(question) for question, _ in pairs]))        # (q, n)
        logits, _, _ = model(questions, state=state_map(lambda s: s.expand(len(pairs), *s.shape[1:]), state))
        marks += [(answer == babi.UNKNOWN, task.words.id(answer) == said)
                  for (_, answer), said in zip(pairs, logits[:, -1].argmax(-1).tolist())]
    for unknown, name in enumerate(("the text answers", "the text does not answer")):
        right = [correct for kind, correct in marks if kind == unknown]
        print(f"{folder}: {100 * sum(right) / len(right):.2f}% of {len(right):,} questions that {name}")


if __name__ == "__main__":
    with one_line_errors("stories.py"):
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        ask_everything(sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__))
