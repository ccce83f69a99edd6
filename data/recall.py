"""
Associative retrieval (ARMT, appendix C; sizes and format as in the authors' scripts). Keys and values are
written in an alphabet of 16 symbols. A value is one symbol; a key is one too, or two if the stages have more
than 16 different keys. With --segment_len 4 (5 with two symbols) a pair is a segment. The question is a
segment of its own, so that whatever is known about a pair has crossed a segment boundary:

    [k_1 .. k_s  :  v  ;]  [k_1 .. k_s  :  v  ;]  ...  [k_1 .. k_s  ?] -> v

    remember   the keys of a sample are all different, and one of them is queried
    rewrite    keys repeat; any key that occurred is queried, and its last value is correct
"""
import numpy as np

from . import Batch, Question, eval_points, generator, numbers, segments

ALPHABET = 16
SYMBOLS = np.arange(1, ALPHABET + 1)            # ids of the symbols; 0 is the blank
TELL, ASK, END = ALPHABET + 1, ALPHABET + 2, ALPHABET + 3
NAMES = [" ", *"0123456789abcdef", ":", "?", ";"]        # how ids are shown
TASKS = dict(
    remember=dict(segment_len=4, n_head=2, batch_size=16, questions=8, stages="2,4,8,16", last_steps=100,
                  eval_lengths="2,4,8,16", eval_samples="1000"),
    rewrite=dict(segment_len=4, n_head=2, questions=16, stages="2,4,8,16,50,50",
                 eval_lengths="16,50,100,200,500", eval_samples="500"))


def spell(keys, key_size):
    """Key numbers (...) below 16^key_size -> ids of their symbols (..., key_size)."""
    return SYMBOLS[keys[..., None] // ALPHABET ** np.arange(key_size)[::-1] % ALPHABET]


class Recall:
    """The task; for the methods see data/__init__.py. A stage is (most pairs,), a length is pairs."""
    vocab_size, vocab, kind, rows, unknown_id = END + 1, [], "recall", [""], -1

    def __init__(self, config):
        self.segment_len, self.n_questions = config.segment_len, config.questions
        self.rewrite = config.task == "rewrite"
        self.unit = "updates" if self.rewrite else "pairs"
        most = 1 if self.rewrite else max(numbers("stages", config.stages, 1, 1))[0]
        self.key_size = 1 if most <= ALPHABET else 2                                  # symbols of a key

    def check(self, config, training=True):
        for flag, values in dict(stages=numbers("stages", config.stages, 1, 1),
                                 eval_lengths=eval_points(config)).items():
            if not self.rewrite and (most := max(values)[0]) > ALPHABET ** self.key_size:
                raise ValueError(f"--{flag}: {most} pairs are more than the {ALPHABET ** self.key_size} keys "
                                 f"that these --stages have")

    def batch(self, rng, size, stage):
        """`size` samples of one length: in half of the batches the stage's, else any up to it."""
        return self.samples(rng, size, int(rng.choice([stage[0], rng.integers(1, stage[0] + 1)])))

    def samples(self, rng, size, n_pairs):
        """`size` samples of n pairs, with --questions questions each: a Batch"""
        n_keys = ALPHABET ** self.key_size
        if self.rewrite:
            keys = rng.integers(n_keys, size=(size, n_pairs))                                         # (B, n)
        else:
            keys = rng.permuted(np.tile(np.arange(n_keys), (size, 1)), axis=1)[:, :n_pairs]           # (B, n)
        values = rng.integers(ALPHABET, size=(size, n_pairs))                                         # (B, n)
        told = np.stack(np.broadcast_arrays(TELL, SYMBOLS[values], END), axis=-1)
        pairs = np.concatenate((spell(keys, self.key_size), told), axis=-1)

        latest = np.full((size, n_keys), -1)                          # place of a key's last pair, -1: never
        latest[np.arange(size)[:, None], keys] = np.arange(n_pairs)   # numpy keeps the last of equal indices
        order = np.where(latest >= 0, rng.random(latest.shape), 2.0)      # keys that occurred first, shuffled
        asked = np.argsort(order, axis=1)[:, :self.n_questions]                                       # (B, Q)
        where = np.take_along_axis(latest, asked, axis=1)                                             # (B, Q)
        answers = np.where(where >= 0, SYMBOLS[np.take_along_axis(values, where, axis=1)], -1)
        questions = np.concatenate((spell(asked, self.key_size), np.full((*asked.shape, 1), ASK)), axis=-1)
        return Batch(segments(pairs.reshape(size, -1), self.segment_len), questions, answers[..., None])

    def cells(self, config):
        return [dict(length=length, n=n) for length, n in eval_points(config)]

    def questions(self, cell):
        """Fresh samples, with one question each."""
        length, n = cell["length"], cell["n"]
        b = self.samples(generator(0, "test", length, n), n, length)
        return [Question([c.ravel()], q, a.tolist())
                for c, q, a in zip(b.context, b.questions[:, 0], b.answers[:, 0])], 0

    def show(self, ids):
        return "".join(NAMES[i] for i in ids)
