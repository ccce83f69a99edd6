"""
Evaluate a run on texts of a million words and more, one after another: segments that leave the memory as it
is are read side by side, and not read again by the same memory (sample.read_fast). train.py reads the shorter
texts of a batch behind blank segments, as in training, so a few answers may differ (of the shipped model, one
of 200 questions of qa3 without other text).

    python results/babilong/long.py --out_dir data/pretrained --babi_dir data/babi \\
        --eval_text data/novels/*.txt --eval_lengths 1M,10M,50M --eval_samples 100,10,4

Flags are those of `train.py --eval_only`; the rows go to metrics.jsonl of the run.
"""
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import torch                                                              # noqa: E402

import train                                                              # noqa: E402
from data import chunks                                                   # noqa: E402
from sample import read_fast                                              # noqa: E402

QUIET = defaultdict(set)     # of each model: which segments did not write to which memory, from text to text


@torch.no_grad()
def answer(model, questions, device, bar):
    """As train.answer, for one question."""
    (question,), T, state = questions, model.config.segment_len, model.init_state(1)
    for chunk in chunks([question.context], 4096 * T, T):
        state, _ = read_fast(model, torch.from_numpy(chunk).to(device).view(-1, T), state, QUIET[model])
        bar.update(chunk.size)
    idx, answers = (torch.tensor([list(ids)], device=device) for ids in (question.question, question.answer))
    return train.ask(model, idx, answers, state)[0].argmax(-1).tolist()


if __name__ == "__main__":
    train.main([*sys.argv[1:], "--eval_only", "--batch_size", "1"], answer)
