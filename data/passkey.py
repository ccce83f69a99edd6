"""
Pass key: five digits are stated, then comes a lot of text that does not matter, then the digits are asked for
(the PassKey task of Hwang et al. 2024). All five must be correct; a guess is correct once in 100,000 times.

    passkey             the key is the very first thing, as in that paper: keeping the first segment is enough
    passkey-random      it stands anywhere
    passkey-decoys      it stands anywhere, and after it come up to three keys that are called false
    passkey-rewritten   up to three keys stand anywhere, and the last one counts
"""
import numpy as np

from . import Batch, Question, eval_points, generator, numbers
from .babilong import InText

KINDS = ("passkey", "passkey-random", "passkey-decoys", "passkey-rewritten")
WORDS = "0 1 2 3 4 5 6 7 8 9 the pass key is remember it a false forget what".split()
DIGITS = 5
TASKS = dict.fromkeys(KINDS, dict(segment_len=32, stages="1,2,4,8,18,18", last_steps=1500,
                                  eval_lengths="2,18,254,2540", eval_samples="1000,1000,100,100"))


def filler(rng, n_tokens, text):
    """Exactly n_tokens tokens of a Background, from the beginning of a random sentence: a list of views."""
    pieces = []
    while n_tokens > 0:
        start = text.begin[rng.integers(len(text.begin) - 1)]
        pieces.append(text.ids[start:start + n_tokens])
        n_tokens -= len(pieces[-1])
    return pieces


class PassKey(InText):
    """The task (see data/__init__.py). A stage is (most segments,), a length is segments, key included."""
    kind, unit, rows, unknown_id = "passkey", "segments", [""], -1

    def __init__(self, config):
        super().__init__(config, WORDS)
        self.place, self.segment_len = config.task.removeprefix("passkey").strip("-"), config.segment_len
        self.digits = np.array([self.words.id(str(digit)) for digit in range(10)])
        self.question = self.words.encode("What is the pass key? The pass key is")

    def statement(self, key, false=False):
        """What states a key, as ids: 23 tokens for a true one."""
        key = " ".join(map(str, key))
        return self.words.encode(f"A false key is {key}. Forget it." if false else
                                 f"The pass key is {key}. Remember it. {key} is the pass key.")

    def context(self, rng, n_tokens, text):
        """One context as a list of arrays, and its key as ids (5,)."""
        free, told, pieces = n_tokens, [], []
        keys = rng.integers(10, size=(dict(decoys=4, rewritten=3).get(self.place, 1), DIGITS))
        for key in keys:
            ids = self.statement(key, false=self.place == "decoys" and len(told) > 0)
            if free >= len(ids):
                told, free = [*told, ids], free - len(ids)
        places = np.sort(rng.integers(free + 1, size=len(told))) if self.place else np.zeros(1, dtype=int)
        for before, ids in zip(np.diff(places, prepend=0), told):
            pieces += [*filler(rng, before, text), np.array(ids)]
        pieces += filler(rng, n_tokens - sum(map(len, pieces)), text)
        return pieces, self.digits[keys[len(told) - 1 if self.place == "rewritten" else 0]]

    def check(self, config, training=True):
        super().check(config, training)
        if self.segment_len < (least := len(self.statement(range(DIGITS)))):
            raise ValueError(f"--segment_len: {self.segment_len} tokens are too few for the {least} of a key")
        numbers("stages", config.stages, most=1, least=1)

    def batch(self, rng, size, stage):
        """`size` contexts of one length, with one question each; its answers have five ids."""
        n = int(rng.integers(min(2, stage[0]), stage[0] + 1))
        made = [self.context(rng, n * self.segment_len, self.text("train")) for _ in range(size)]
        context = np.stack([np.concatenate(pieces) for pieces, _ in made]).reshape(size, n, -1)
        return Batch(context, np.tile(self.question, (size, 1, 1)), np.stack([[key] for _, key in made]))

    def cells(self, config):
        return [dict(length=length, n=n, **self.where) for length, n in eval_points(config)]

    def questions(self, cell):
        """Fresh contexts in text that training has not seen."""
        length, text = cell["length"], self.text("eval")
        made = [self.context(generator(0, "test", length, i), length * self.segment_len, text)
                for i in range(cell["n"])]
        return [Question(context, self.question, key.tolist()) for context, key in made], 0
