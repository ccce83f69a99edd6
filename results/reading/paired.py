"""
Does reading slow down with what was read before? One reader reads 10 million words; a second one, whose memory is fresh,
reads the same 10,000 of them right before or after it, so that a busy machine slows both. From the top of the repository:

    python results/reading/paired.py book.txt > paired.jsonl
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

import sample
from train import load, make_task

torch.set_num_threads(1)
torch.set_flush_denormal(True)
device, fact = torch.device("cpu"), "Mary went to the kitchen."
config, model, _ = load(str(sample.PRETRAINED), device)
long, fresh = (sample.Reader(model, make_task(config), device) for _ in range(2))
words = Path(sys.argv[1]).read_text(encoding="utf-8").split()
long.tell(fact)


def seconds(reader, text):
    before = reader.seconds
    reader.tell(text)
    return round(reader.seconds - before, 4)


for number, at in enumerate(range(0, 10_000_000, 10_000)):
    text = " ".join(words[(at + i) % len(words)] for i in range(10_000)) + " "
    if 110 <= number < 890 and number % 10:                        # in the middle every tenth time is enough
        long.tell(text)
        continue
    fresh.forget()
    fresh.tell(fact)
    pair = (fresh, long) if (number + number // 10) % 2 else (long, fresh)                   # they take turns
    times = {reader: seconds(reader, text) for reader in pair}
    print(json.dumps(dict(words=at, long=times[long], fresh=times[fresh])), flush=True)
