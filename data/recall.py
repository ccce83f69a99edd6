"""
Associative retrieval (ARMT, appendix C; sizes and format as in the authors' scripts). Keys and values are written in
an alphabet of 16 symbols. One pair is one segment, and the question is a segment of its own, so that whatever is
known about a pair has crossed a segment boundary:

    [k_1 .. k_s  :  v  ;]  [k_1 .. k_s  :  v  ;]  ...  [k_1 .. k_s  ?] -> v

    remember   the keys of a sample are all different; asked is any of them
    rewrite    keys repeat; asked is any key that occurred, and right is the value it got last
"""
import numpy as np

from . import Batch, Question, generator

ALPHABET = 16
SYMBOLS = np.arange(1, ALPHABET + 1)            # ids of the symbols; 0 is the blank
TELL, ASK, END = ALPHABET + 1, ALPHABET + 2, ALPHABET + 3
VOCAB_SIZE = END + 1
NAMES = [" ", *"0123456789abcdef", ":", "?", ";"]        # how ids are shown


def spell(keys, key_size):
    """Key numbers (...) below 16^key_size -> ids of their symbols (..., key_size)."""
    return SYMBOLS[keys[..., None] // ALPHABET ** np.arange(key_size)[::-1] % ALPHABET]


def batch(rng, size, n_pairs, key_size=1, n_questions=1, rewrite=False):
    """
    `size` samples of `n_pairs` pairs with n_questions questions each -> Batch with contexts (B, n_pairs (key_size + 3)).
    ValueError when remember asks for more pairs than there are keys.
    """
    n_keys = ALPHABET ** key_size
    if not rewrite and n_pairs > n_keys:
        raise ValueError(f"key_size: {n_pairs} different keys need more than {key_size} symbol(s), which spell {n_keys}")
    if rewrite:
        keys = rng.integers(n_keys, size=(size, n_pairs))                                               # (B, n)
    else:
        keys = rng.permuted(np.tile(np.arange(n_keys), (size, 1)), axis=1)[:, :n_pairs]                 # (B, n)
    values = rng.integers(ALPHABET, size=(size, n_pairs))                                               # (B, n)
    pairs = np.empty((size, n_pairs, key_size + 3), dtype=np.int64)
    pairs[..., :key_size] = spell(keys, key_size)
    pairs[..., key_size:] = np.stack(np.broadcast_arrays(TELL, SYMBOLS[values], END), axis=-1)

    latest = np.full((size, n_keys), -1)                                        # place of a key's last pair, -1: never
    latest[np.arange(size)[:, None], keys] = np.arange(n_pairs)                 # numpy keeps the last of equal indices
    if n_questions >= n_keys:
        asked = np.tile(np.arange(n_keys), (size, 1))                           # every key, in order
    else:
        order = np.where(latest >= 0, rng.random(latest.shape), 2.0)            # keys that occurred first, shuffled
        asked = np.argsort(order, axis=1)[:, :n_questions]                                              # (B, Q)
    where = np.take_along_axis(latest, asked, axis=1)                                                   # (B, Q)
    answers = np.where(where >= 0, SYMBOLS[np.take_along_axis(values, where, axis=1)], -1)
    questions = np.concatenate((spell(asked, key_size), np.full((*asked.shape, 1), ASK)), axis=-1)
    return Batch(pairs.reshape(size, -1), questions, answers)


def stored_pairs(n_pairs, accuracy):
    """How many of n pairs are remembered, if the rest is guessed among 16 values (ARMT, appendix B)."""
    return n_pairs * (ALPHABET * accuracy - 1) / (ALPHABET - 1)


class Recall:
    """The task as train.py and sample.py use it. A stage is (n_pairs,); so is the length of an evaluation."""
    vocab_size = VOCAB_SIZE
    unit = "pairs"

    def __init__(self, key_size=1, n_questions=1, rewrite=False):
        self.key_size, self.n_questions, self.rewrite = key_size, n_questions, rewrite

    def batch(self, rng, size, stage, earlier=None):
        """A Batch. Where rows go on (rewrite, all keys asked), a key that is not written again keeps its value."""
        b = batch(rng, size, *stage, self.key_size, self.n_questions, self.rewrite)
        for answers, old in zip(b.answers, earlier or ()):
            if old:
                answers[:] = np.where(answers < 0, old, answers)
        return b._replace(stories=b.answers.tolist())

    def questions(self, length, n, babi_dir="", files=None):
        """n fresh samples of `length` pairs with one question each, and 0 for those left out."""
        b = batch(generator(0, "test", length, n), n, length, self.key_size, 1, self.rewrite)
        return [Question([c], q, a) for c, q, a in zip(b.context, b.questions[:, 0], b.answers[:, 0])], 0

    def show(self, ids):
        return "".join(NAMES[i] for i in ids)
