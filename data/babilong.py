"""
BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a story, in order and unbroken, scattered
through background text of any length, and the question at the end.

Words are tokens. The words of the bAbI tasks have ids of their own; every other word falls, by its crc32,
into one of a fixed number of buckets. So there is no vocabulary to build, and any text can be read. Capitals
do not matter. Lengths count the words of facts and background, not the marks . ? ! and not the question.
"""
import itertools
import random
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from . import Batch, Question, babi, eval_points, fill, generator, numbers, segments
from .files import read_text

MARKS = [".", "?", "!"]
SHORTEST = 10                       # tokens of a sentence of the background, its mark included
BUCKETS = 1024                      # ids shared by all words that are not the task's
SWAPPED = 0.3                   # share of those words that are swapped in training: no text is known by heart
BRIEF = 256                         # where segments grow: most words of a text with one sentence in a segment
PROSE = "prose"                     # the name of the built-in background

BASE = dict(n_layer=3, n_mem=8, rule="delta", gate="hardsigmoid", segment_len=8, align=8, decoys=0.5,
            price=0.01, batch_size=64, stages="4/0,10/0,10/128,10/256", last_steps=500,
            eval_lengths="0,1k,4k,16k", eval_samples="1000,1000,500,200")
TASKS = dict(
    qa1=dict(BASE, n_mem=4),
    qa2=dict(BASE, learned=0.97, stages="4/0,10/0,20/0,20/128,30/256", last_steps=1000),
    qa3=dict(BASE, learned=0.9, stages="6/0,10/0,20/0,40/0,40/128,40/256", last_steps=1500),
    qa4=dict(BASE, n_mem=4, stages="2/0,2/128,2/256"),
    qa5=dict(BASE, stages="4/0,10/0,20/0,20/128,20/256"),
    babilong=dict(BASE, learned=0.93, stages="2/0,4/0,6/0,10/0,20/0,40/128,40/256", last_steps=2000))
ALL = ["qa1", "qa2", "qa3", "qa3", "qa3", "qa4", "qa4", "qa5"]   # tasks that are slow to learn have more rows


class Words:
    """Text <-> ids: 0 is the blank, then come marks, `vocab`, and BUCKETS ids shared by all other words."""

    def __init__(self, vocab=babi.WORDS):
        self.vocab = list(vocab)
        self.names = [" ", *MARKS, *self.vocab]
        self.ids = {name.lower(): i for i, name in enumerate(self.names)}
        self.size = len(self.names) + BUCKETS

    def split(self, text):
        return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[.?!]", text)

    def id(self, word):
        word = word.lower()
        i = self.ids.get(word)
        return len(self.names) + zlib.crc32(word.encode()) % BUCKETS if i is None else i

    def encode(self, text):
        return [self.id(word) for word in self.split(text)]

    @staticmethod
    def pad(ids, align, offset=0):
        """
        The ids, with blanks after each sentence up to the next multiple of `align`, if that is not 0;
        `offset` ids stand before them. differs: the papers cut their text anywhere, which is harder for a
        small model.
        """
        if not align:
            return ids
        out = []
        for i in ids:
            out.append(i)
            if 0 < i <= len(MARKS):
                out += [0] * (-(offset + len(out)) % align)
        return out

    def unknown(self, text):
        """The words of the text that have no id of their own, each once."""
        return list(dict.fromkeys(word for word in self.split(text) if word.lower() not in self.ids))

    def name(self, i):
        """What the model means by id i; all words of a bucket look alike."""
        return self.names[i] if i < len(self.names) else "(another word)"

    @staticmethod
    def count(ids):
        """How many of the ids are words, neither blank nor mark."""
        return int((np.asarray(ids) > len(MARKS)).sum())


# --- Background text ----------------------------------------------------------------------------------------

GRAMMAR = dict(
    S=["NP VP and NP VP .", "NP VP because NP VP .", "when NP VP , NP VP .", "ADV , NP VP with NP .",
       "NP who VP had never VP , and NP VP .", "the N NEVER VP ADV , said NP to NP .",
       "it was TIME when NP VP near NP .", "NP VP , but nobody asked NP why the N had VP .",
       "where had NP gone before NP VP ADV ?"],
    NP=["the N", "the A N", "a A N", "the N of the N", "an old N", "his A N", "her N", "NAME",
        "their N and the N"],
    VP=["V NP", "V the N ADV", "V NP in the N", "V to the N", "V the A N for NP", "V past the N near NP"],
    N="""captain letter sister sea window doctor horse street candle story river winter question lamp
        stranger bridge village carriage teacher ship clock mountain room door table evening road dog fire
        garden kitchen office island whale hat merchant piano soldier farmer mirror forest voice""".split(),
    A="""quiet dark heavy famous narrow silver cold broken pleasant curious yellow tired foolish distant
        proud strange gentle wooden empty sudden white green""".split(),
    V="""watched followed remembered sold painted crossed answered carried found opened forgot praised
        feared noticed visited brought left took went moved walked wrote turned""".split(),
    ADV=["slowly", "again", "at once", "with great care", "in silence", "without a word", "for many years",
         "upstairs"],
    TIME=["late", "early in spring", "nearly midnight", "a bright day", "the hour"],
    NEVER=["must", "should", "will", "may not", "could"],
    NAME="Arthur Helen Thomas Clara Edward Ruth Oliver Alice Henry Mary John the-captain Mrs-Bennet".split())


def prose(n_sentences, seed):
    """Made-up background sentences, so that everything runs without a file: a function of the seed."""
    choose = random.Random(seed).choice

    def grow(symbol):
        return " ".join(map(grow, choose(GRAMMAR[symbol]).split())) if symbol in GRAMMAR else symbol

    return " ".join(grow("S") for _ in range(n_sentences))


class Background:
    """
    Sentences to hide facts in: those of at least SHORTEST tokens of the given UTF-8 files, in their natural
    order. `part` says which of them: 'train' is the first 90% of each text, 'val' the rest, 'test' all of it;
    for the built-in prose these are three different texts. `change` is a function that each of them goes
    through, from ids to ids. Of `copies` of a text copy i lacks the first i tokens of each sentence: aligned
    sentences then end anywhere in a segment. Errors (a missing, empty or non-text file) name the file.
    """

    def __init__(self, files, part, words, align=0, change=list, copies=1):
        flat = []                                                            # sentences, as lists of ids
        for file in files:
            built_in = str(file) == PROSE
            text = prose(4000 if part == "val" else 20000, seed=part) if built_in else read_text(file)
            ids = words.encode(text)
            ends = [i for i, word in enumerate(ids, start=1) if word <= len(MARKS)]
            sentences = [ids[a:b] for a, b in itertools.pairwise([0, *ends, len(ids)]) if a < b]
            if not built_in:
                end = len(sentences) * 9 // 10
                sentences = dict(train=sentences[:end], val=sentences[end:], test=sentences)[part]
            long = [words.pad(change(s[i:]), align)
                    for i in range(copies) for s in sentences if len(s) >= SHORTEST]
            if not long:
                raise ValueError(f"{file}: no sentence of {SHORTEST - 1} or more words for its {part} part")
            flat += long
        self.ids, self.align = np.concatenate(flat).astype(np.int64), align
        self.begin = np.cumsum([0, *map(len, flat)])                      # where sentence i begins, in tokens
        self.n_words = np.concatenate(([0], np.cumsum(self.ids > len(MARKS))))    # words before token t

    def runs(self, rng, n_words):
        """
        Exactly n_words words of text as (first, last, stop): sentences first..last-1, of which the last is
        cut at token `stop`. The text is entered at a random sentence and goes round: no sentence is read
        twice before all are read once.
        """
        first = int(rng.integers(len(self.begin) - 1))
        while n_words > 0:
            before, stop = self.n_words[self.begin[first]], self.begin[-1]
            if self.n_words[stop] - before > n_words:
                stop = np.searchsorted(self.n_words, before + n_words)
            n_words -= int(self.n_words[stop] - before)
            yield first, int(np.searchsorted(self.begin, stop)), int(stop)
            first = 0


def look_alike(dice, sentence, facts, fact_ids):
    """
    The sentence (list of ids), made to resemble a fact without being one: with words of a fact here and
    there, or with one of `facts` somewhere in it, or in front of it, in which a word or two are those of no
    fact. `fact_ids` are the ids of all facts.
    """
    strange = [i for i in sentence if i > len(MARKS) and i not in fact_ids]
    *fact, mark = dice.choice(facts)
    kind = dice.choice(["words", "inside", "front"])
    if kind == "words" or not strange:
        return [dice.choice(fact) if i > len(MARKS) and dice.random() < 0.2 else i for i in sentence]
    for place in dice.sample(range(len(fact)), dice.choice([1, 2])):
        fact[place] = dice.choice(strange)
    place = dice.randrange(len(sentence))
    return fact + [mark] + sentence if kind == "front" else \
        sentence[:place] + fact + (sentence[place + len(fact):] or [mark])


# --- Composing a sample -------------------------------------------------------------------------------------

def compose(rng, facts, length, background):
    """
    Scatter `facts` (lists of ids) through background text, `length` words in all (0: the facts alone), as in
    BABILong: a slot before each sentence and one at the end, one slot drawn for each fact, uniformly, and
    sorted. Returns the context as a list of arrays to be read one after another: views of the background, so
    any length needs no more memory than a book. The facts must not be longer.
    """
    runs = list(background.runs(rng, length - sum(map(Words.count, facts)))) if length else []
    slots = np.sort(rng.integers(0, sum(last - first for first, last, _ in runs) + 1, size=len(facts)))
    pieces, seen, todo = [], 0, [*zip(slots, map(np.array, facts))]          # seen: sentences of earlier runs
    for first, last, stop in runs:
        here = background.begin[first]
        while todo and todo[0][0] < seen + last - first:
            slot, fact = todo.pop(0)
            end = background.begin[first + slot - seen]
            pieces += [background.ids[here:end], fact]
            here = end
        blanks = -(stop - background.begin[first]) % (background.align or 1)     # the last sentence was cut
        pieces += [background.ids[here:stop], np.zeros(blanks, dtype=np.int64)]
        seen += last - first
    return [piece for piece in [*pieces, *(fact for _, fact in todo)] if len(piece)]


class InText:
    """What tasks share that hide something in background text."""
    decoys = 0.0                        # share of the sentences of the training text that `disguise` changes

    def __init__(self, config, vocab):
        self.words = Words(config.vocab or vocab)
        self.vocab, self.vocab_size = self.words.vocab, self.words.size
        self.files, self.eval_files = list(config.background), list(config.eval_text or config.background)
        seen = {Path(file).name for file in self.files} & {Path(file).name for file in self.eval_files}
        self.where = dict(text=[Path(file).name for file in self.eval_files],
                          split="val" if seen else "test")   # val: passages that were held back from training
        self.text = cache(self.text)                         # made once it is needed, and only once

    def text(self, part, align=0):
        """The Background to train with (part "train") or to evaluate in ("eval")."""
        if part == "train":
            change = self.disguise() if self.decoys else list
            copies = min(max(1, align), SHORTEST)                # each has something of every sentence
            return Background(self.files, "train", self.words, align, change, copies)
        return Background(self.eval_files, self.where["split"], self.words, align)

    def check(self, config, training=True):
        asked = self.eval_files * any(cell["length"] > 0 for cell in self.cells(config))
        for files, part in ((self.files * training, "train"), (asked, self.where["split"])):
            for file in set(files) - {PROSE}:
                Background([file], part, self.words)

    def show(self, ids):
        return " ".join(self.words.name(i) if i < len(self.words.names) else "~" for i in ids if i)


class BABILong(InText):
    """
    One or more of bAbI's first five tasks in background text; for the methods see data/__init__.py. A stage
    is (most facts, most words), a length is words. Training stories are simulated, and never published ones.

    Segments that grow can be a curriculum. If --align is below --segment_len, a sentence begins a segment of
    --align tokens in training; in a stage with a third number, three of four batches are in segments of that
    many tokens instead. If the stage has no text, sentences begin at multiples of --align there, so a segment
    holds several whole ones; if it has text, all is cut anywhere, as it is in evaluation. The fourth batch
    gets no text beyond BRIEF words: long texts in short segments take much of the time.
    """
    kind, unit = "qa", "words"
    n_questions = 8                     # most questions to one story: reading costs more than asking
    width = 8                           # ids of a question, blanks in front included: those of the longest

    def __init__(self, config):
        super().__init__(config, babi.WORDS)
        self.rows = ALL if config.task == "babilong" else config.task.split("+")
        self.segment_len, self.sentence = config.segment_len, config.align
        self.align = config.align if config.align == config.segment_len else 0
        self.babi_dir, self.decoys = config.babi_dir, config.decoys
        self.unknown_id = self.words.id(babi.UNKNOWN)
        self.where.update(questions="published" if self.babi_dir else "simulated", align=self.align,
                          segment_len=self.segment_len)
        self.encode = cache(self.words.encode)           # there are only so many different sentences
        self.samples = {}                                # which stories were read, once

    def ask(self, text):
        """The ids of a question, left-padded to one width, as in training."""
        return [0] * (self.width - len(self.encode(text))) + self.encode(text)

    def tell(self, facts, align):
        """The ids of facts, as they stand in a text."""
        return [self.words.pad(self.encode(fact), align) for fact in facts]

    def disguise(self):
        """A function from ids to ids, after which a share, --decoys, of all sentences looks like facts."""
        facts = [self.encode(line.text) for part in self.rows
                 for story in babi.simulate(random.Random(0), part, 200)
                 for line in story if line.answer is None]
        fact_ids, dice = {i for fact in facts for i in fact}, random.Random("decoys")
        return lambda ids: look_alike(dice, ids, facts, fact_ids) if dice.random() < self.decoys else ids

    def check(self, config, training=True):
        """ValueError, naming flag or file, for settings and files that cannot serve."""
        if config.align > config.segment_len:
            raise ValueError(f"--align: {config.align} is more than the --segment_len, {config.segment_len}")
        low, high = config.align, config.segment_len
        grown = (*range(low, high, low), high) if 0 < low < high else ()
        for stage in numbers("stages", config.stages, least=1):
            if training and len(stage) == 3 and stage[2] not in grown:
                raise ValueError(f"--stages: segments of {stage[2]} tokens: neither --segment_len ({high}) "
                                 f"nor a multiple of an --align that is above 0 and below it")
        if training and config.batch_size < len(self.rows):
            raise ValueError(f"--batch_size: {config.task} needs at least {len(self.rows)} rows")
        super().check(config, training)
        for part in dict.fromkeys(self.rows) if self.babi_dir else ():
            babi.read_stories(babi.find_file(self.babi_dir, part))

    def story(self, dice, part, n_facts):
        """
        What a row is told, as texts, and up to eight questions with their answers: four of the published
        form; three of other kinds that the text answers; and one whose answer is "unknown". (With more of
        other kinds the model takes long to learn qa4; with fewer it places a thing with its last holder.)
        """
        least = dict(qa2=2, qa3=3, qa5=2).get(part, 1)     # with fewer facts nothing of its kind can be asked
        while True:
            events = list(itertools.islice(babi.world(dice, part), n_facts))
            told = [event.text for event in events]
            own = [(ask.question, ask.answer) for about in babi.subjects(part, events)
                   for ask in babi.asks(part, events, about)]
            if (own or n_facts < least) and not babi.is_published(told):
                break
        asked = {kind: list(pairs.items()) for kind, pairs in babi.everything(events).items()}
        known = [[pair for pair in pairs if pair[1] != babi.UNKNOWN and pair not in own]
                 for pairs in asked.values()]
        unknown = [pair for pair in asked[dice.choice([part, *asked])] if pair[1] == babi.UNKNOWN]
        found = dice.sample(own, min(len(own), 4))
        found += [dice.choice(pairs) for pairs in dice.sample(known, len(known)) if pairs][:3]
        return told, found + dice.sample(unknown, min(len(unknown), 1))

    def batch(self, rng, size, stage):
        """`size` stories in texts of about one length, with up to eight questions about each."""
        most_facts, most_words, longer = (*stage, 0, 0)[:3]
        dice = random.Random(int(rng.integers(2 ** 62)))   # random.Random is ten times faster here than numpy
        n_facts = int(rng.integers(1, most_facts + 1))
        length = int(most_words * rng.random() ** 2)            # short ones more often than long
        align, T = self.align, self.segment_len
        if 0 < self.sentence < T:
            T = longer if rng.random() < 0.75 and longer else self.sentence
            align = self.sentence if T == self.sentence or not most_words else 0
            if T < longer:
                length = min(length, BRIEF)
        rows, questions, answers = [], [], np.full((size, self.n_questions, 1), -1)
        for i in range(size):
            part = self.rows[i % len(self.rows)]
            facts, found = self.story(dice, part, dice.choice([1, 2, 2, 2]) if part == "qa4" else n_facts)
            facts = self.tell(facts, align)
            if length:
                n_words, text = max(length, sum(map(Words.count, facts))), self.text("train", align)
                facts = compose(rng, facts, n_words, text)
            rows.append(np.concatenate(facts))
            questions += [self.ask(q) for q, _ in found] + [[]] * (self.n_questions - len(found))
            answers[i, :len(found), 0] = [self.words.id(answer) for _, answer in found]
        context = segments(rows, T)
        swapped = (context >= len(self.words.names)) & (rng.random(context.shape) < SWAPPED)
        context[swapped] = rng.integers(len(self.words.names), self.words.size, size=swapped.sum())
        return Batch(context, fill(questions).reshape(size, self.n_questions, -1), answers)

    def cells(self, config):
        return [dict(part=part, length=length, n=n, **self.where)
                for part in dict.fromkeys(self.rows) for length, n in eval_points(config, 0)]

    def questions(self, cell):
        """The published or simulated questions of one part: of n stories if there are so many."""
        key, out = cell["part"], []
        if key not in self.samples:
            stories = babi.read_stories(babi.find_file(self.babi_dir, key)) if self.babi_dir else \
                babi.simulate(random.Random(f"val {key}"), key, 1000)
            self.samples[key] = babi.spread(stories)
        samples, length = self.samples[key][:cell["n"]], cell["length"]
        text = self.text("eval", self.align) if length else None
        for i, sample in enumerate(samples):
            facts = self.tell(sample.facts, self.align)
            if not 0 < length < sum(map(Words.count, facts)):
                context = compose(generator(0, "test", length, i), facts, length, text)
                out.append(Question(context, self.ask(sample.question), [self.words.id(sample.answer)]))
        return out, len(samples) - len(out)
