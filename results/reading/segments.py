"""
The memory that one step of training takes through 32 segments of 512 tokens, eight texts side by side, with the
switches of train.py. From the top of the repository, once without a switch and once with each:

    python results/reading/segments.py [--recompute 1] [--bptt 4] >> segments.jsonl
"""
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch

from sample import peak_mb
from train import Config, Run, parse

SEGMENTS, LENGTH, TEXTS = 32, 512, 8
torch.set_num_threads(1)
switches = {name: values[0] for name, values in parse(sys.argv[1:])[1].items()}
config = Config(task="passkey", segment_len=LENGTH, batch_size=TEXTS, out_dir="out/segments", **switches)
run, before, began = Run(config, torch.device("cpu"), None), peak_mb(), time.time()
context = torch.randint(config.vocab_size, (TEXTS, SEGMENTS * LENGTH))
state = run.read(context, None)
sum((s ** 2).sum() for layer in state for s in layer if torch.is_tensor(s)).backward()
print(json.dumps(dict(switches=switches, parameters=run.model.n_params(), before_mb=before, peak_mb=peak_mb(),
                      seconds=round(time.time() - began, 1), torch=torch.__version__)))
