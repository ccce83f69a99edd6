"""
Pass key: five digits are told, then comes a lot of text that does not matter, then the digits are asked for (the
PassKey task of Hwang et al. 2024). All five must be right; a guess is right once in 100,000 times.

    first       the key is the very first thing, as in that paper: to keep the first segment for good is enough
    random      it stands anywhere
    decoys      it stands anywhere, and behind it come up to three keys that are called false
    rewritten   up to three keys stand anywhere, and the last one counts
"""
import numpy as np

from . import Batch, Question, generator
from .babilong import PROSE, InText

KINDS = ("first", "random", "decoys", "rewritten")
WORDS = "0 1 2 3 4 5 6 7 8 9 the pass key is remember it a false forget what".split()
DIGITS = 5


class PassKey(InText):
    """
    The task as train.py and sample.py use it. A stage is (most segments,), the length of an evaluation is its segments;
    a context of n segments has exactly n segment_len tokens, the key included.
    """
    unit = "segments"

    def __init__(self, words, files=(PROSE,), kind="first", segment_len=32):
        super().__init__(words, files)
        self.kind, self.segment_len = kind, segment_len
        self.digits = np.array([words.id(str(digit)) for digit in range(10)])
        self.question = words.encode("What is the pass key? The pass key is")

    def statement(self, key, false=False):
        """What tells a key, as ids: 23 tokens for a true one."""
        key = " ".join(map(str, key))
        text = f"A false key is {key}. Forget it." if false else \
            f"The pass key is {key}. Remember it. {key} is the pass key."
        return self.words.encode(text)

    def context(self, rng, n_tokens, files, part):
        """
        One context as a list of arrays, its key (5,), and how many tokens stand before it. ValueError if it is too short
        for what it has to tell.
        """
        free, told, false = n_tokens, [], self.kind == "decoys"
        keys = rng.integers(10, size=(dict(decoys=4, rewritten=3).get(self.kind, 1), DIGITS))
        for key in keys:
            ids = self.statement(key, false=false and len(told) > 0)
            if free >= len(ids):
                told, free = [*told, ids], free - len(ids)
        if not told:
            raise ValueError(f"segment_len: {n_tokens} tokens are too few for the {len(ids)} of a key")
        places = np.zeros(1, dtype=int) if self.kind == "first" else np.sort(rng.integers(free + 1, size=len(told)))
        pieces, at, starts = [], 0, []
        for place, ids in zip(places, told):
            pieces += self.filler(rng, place - at, files, part)
            starts.append(sum(map(len, pieces)))
            pieces.append(np.array(ids))
            at = place
        right = len(told) - 1 if self.kind == "rewritten" else 0
        return pieces + self.filler(rng, free - at, files, part), keys[right], starts[right]

    def filler(self, rng, n_tokens, files, part):
        """Exactly n_tokens tokens of background, from the beginning of a random sentence, as a list of views."""
        background, pieces = self.text(files, part), []
        while n_tokens > 0:
            start = background.begin[rng.integers(len(background.begin) - 1)]
            pieces.append(background.ids[start:start + n_tokens])
            n_tokens -= len(pieces[-1])
        return pieces

    def batch(self, rng, size, stage, earlier=None):
        """
        `size` contexts of one length, with one question each -> Batch; its answers are (B, 1, 5). A row that goes on
        has told its key: it reads nothing but filler.
        """
        most = stage[0]
        n_tokens = int(rng.integers(min(2, most), most + 1)) * self.segment_len
        rows, answers = [], np.empty((size, 1, DIGITS), dtype=np.int64)
        for i in range(size):
            if earlier and earlier[i]:
                pieces, answers[i, 0] = self.filler(rng, n_tokens, self.files, "train"), earlier[i]
            else:
                pieces, key, _ = self.context(rng, n_tokens, self.files, "train")
                answers[i, 0] = self.digits[key]
            rows.append(np.concatenate(pieces))
        questions = np.broadcast_to(self.question, (size, 1, len(self.question)))
        return Batch(np.stack(rows), questions, answers, answers[:, 0].tolist())

    def questions(self, length, n, babi_dir="", files=None):
        """n fresh contexts of `length` segments in text that training has not seen, and 0 for those left out."""
        files, out = files or self.files, []
        for i in range(n):
            rng = generator(0, "test", length, i)
            context, key, start = self.context(rng, length * self.segment_len, files, self.part(files))
            depth = None if self.kind == "first" else start / (length * self.segment_len)
            out.append(Question(context, self.question, self.digits[key], depth))
        return out, 0
