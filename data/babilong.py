"""
BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a story, in order and unbroken, scattered through
background text of any length, and the question at the end.

Words are tokens. The words of the bAbI tasks have ids of their own; every other word falls, by its crc32, into one of
a fixed number of buckets. So there is no vocabulary to build, and any text can be read. Capitals do not matter.
Lengths count the words of facts and background, not the marks . ? ! and not the question.
"""
import itertools
import json
import random
import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import Batch, Question, babi, fill, generator

MARKS = [".", "?", "!"]
GPT2_TOKENS = 1.44                  # to a word: the 128K split of BABILong has 127,695 in 88,592 words
EASIER = dict(qa2=["qa1"], qa3=["qa2", "qa1"])     # where a thing is, is where somebody went; where it was, where it is
PROSE = "prose"                     # the name of the built-in background


class Words:
    """
    Text <-> ids: 0 is the blank, then the marks, then `words`, then `buckets` ids shared by all other words. `align` is
    the length of the segments in which every sentence is to begin one; 0 lets sentences begin anywhere.
    """

    def __init__(self, words=babi.WORDS, buckets=1024, align=0):
        self.words, self.buckets, self.align = list(words), buckets, align
        self.names = [" ", *MARKS, *self.words]
        self.ids = {name.lower(): i for i, name in enumerate(self.names)}
        self.size = len(self.names) + buckets

    def split(self, text):
        return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[.?!]", text)

    def id(self, word):
        word = word.lower()
        known = self.ids.get(word)
        return len(self.names) + zlib.crc32(word.encode()) % self.buckets if known is None else known

    def encode(self, text):
        return [self.id(word) for word in self.split(text)]

    def pad(self, ids, at=0):
        """
        With `align`, the ids and blanks behind each sentence up to the next segment; `at` ids stand before them.
        differs: the papers cut their text anywhere. Several facts in one segment are what a small model finds hard.
        """
        if not self.align:
            return ids
        out = []
        for i in ids:
            out.append(i)
            if 0 < i <= len(MARKS):
                out += [0] * (-(at + len(out)) % self.align)
        return out

    def unknown(self, text, known=None):
        """The words of the text that are not known, each once. If not said, all words with ids of their own are."""
        known = self.ids if known is None else known
        return list(dict.fromkeys(word for word in self.split(text) if word.lower() not in known and word not in MARKS))

    def name(self, i):
        """What the model means by id i; all words of a bucket look alike."""
        return self.names[i] if i < len(self.names) else "(another word)"

    @staticmethod
    def count(ids):
        """How many of the ids are words, neither blank nor mark."""
        return int((np.asarray(ids) > len(MARKS)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Background text
# ---------------------------------------------------------------------------------------------------------------------

GRAMMAR = {
    "S": ["NP VP and NP VP .", "NP VP because NP VP .", "when NP VP , NP VP .", "ADV , NP VP with NP .",
          "NP who VP had never VP , and NP VP .", "the N NEVER VP ADV , said NP to NP .", "it was TIME when NP VP near NP .",
          "NP VP , but nobody asked NP why the N had VP .", "where had NP gone before NP VP ADV ?"],
    "NP": ["the N", "the A N", "a A N", "the N of the N", "an old N", "his A N", "her N", "NAME", "their N and the N"],
    "VP": ["V NP", "V the N ADV", "V NP in the N", "V to the N", "V the A N for NP", "V past the N near NP"],
    "N": """captain letter sister sea window doctor horse street candle story river winter question lamp stranger bridge
        village carriage teacher ship clock mountain room door table evening road dog fire garden kitchen office island
        whale hat merchant piano soldier farmer mirror forest voice""".split(),
    "A": """quiet dark heavy famous narrow silver cold broken pleasant curious yellow tired foolish distant proud strange
        gentle wooden empty sudden white green""".split(),
    "V": """watched followed remembered sold painted crossed answered carried found opened forgot praised feared noticed
        visited brought left took went moved walked wrote turned""".split(),
    "ADV": ["slowly", "again", "at once", "with great care", "in silence", "without a word", "for many years", "upstairs"],
    "TIME": ["late", "early in spring", "nearly midnight", "a bright day", "the hour"],
    "NEVER": ["must", "should", "will", "may not", "could"],
    "NAME": "Arthur Helen Thomas Clara Edward Ruth Oliver Alice Henry Mary John the-captain Mrs-Bennet".split(),
}


def prose(n_sentences, seed):
    """Made-up background sentences, so that everything runs without a file: the same for the same seed, anywhere."""
    choose = random.Random(seed).choice

    def grow(symbol):
        return " ".join(map(grow, choose(GRAMMAR[symbol]).split())) if symbol in GRAMMAR else symbol

    return " ".join(grow("S") for _ in range(n_sentences))


class Background:
    """
    Sentences to hide facts in: those of at least `shortest` tokens of the given UTF-8 files, in their natural order.
    `part` says which of them: 'train' is the first 90% of each text, 'val' the rest, 'test' all of it; for the
    built-in prose these are three different texts. `change` is a function that each of them goes through, from ids to
    ids. Errors (a missing, empty or non-text file) name the file.
    """

    def __init__(self, files=(PROSE,), part="train", words=None, shortest=10, change=list):
        words = words or Words()
        texts = []                                                                  # lists of sentences
        for file in files:
            sentences = split_sentences(words, read_text(file, part))
            if str(file) != PROSE:
                cut = len(sentences) * 9 // 10
                sentences = dict(train=sentences[:cut], val=sentences[cut:], test=sentences)[part]
            texts.append([words.pad(change(s)) for s in sentences if len(s) >= shortest])
            if not texts[-1]:
                raise ValueError(f"{file} has no sentence of {shortest} or more words")
        flat = [s for text in texts for s in text]
        self.ids, self.align = np.concatenate(flat).astype(np.int64), words.align
        self.begin = np.cumsum([0] + [len(s) for s in flat])                        # where sentence i begins, in tokens
        self.text_end = np.cumsum([len(text) for text in texts])                    # sentences up to the end of text i
        self.n_words = np.concatenate(([0], np.cumsum(self.ids > len(MARKS))))      # words before token t

    def runs(self, rng, n_words):
        """
        Exactly n_words words of text as (first, last, stop): whole sentences first..last-1, of which the last is cut
        at token `stop`. A run starts at a random sentence; when its text ends, the next one starts at random again.
        """
        while n_words > 0:
            first = int(rng.integers(len(self.begin) - 1))
            last = int(self.text_end[np.searchsorted(self.text_end, first, side="right")])
            start, stop = self.begin[first], self.begin[last]
            if self.n_words[stop] - self.n_words[start] > n_words:
                stop = np.searchsorted(self.n_words, self.n_words[start] + n_words)
                last = int(np.searchsorted(self.begin, stop))
            n_words -= int(self.n_words[stop] - self.n_words[start])
            yield first, last, int(stop)


def read_text(file, part="train"):
    """The text of a file, or of the built-in prose. Errors are ValueErrors that name the file."""
    if str(file) == PROSE:
        return prose(dict(train=20000, val=4000, test=20000)[part], seed=part)
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except OSError as e:
        raise ValueError(f"cannot read {file}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def split_sentences(words, text):
    """Text -> list of lists of ids, each ending with its mark."""
    sentences, sentence = [], []
    for i in words.encode(text):
        sentence.append(i)
        if i <= len(MARKS):
            sentences.append(sentence)
            sentence = []
    return sentences + [sentence] if sentence else sentences


def look_alike(dice, sentence, facts, known):
    """
    A sentence (list of ids) with something of a fact in it that is none: words here and there, or at its beginning, or
    in front of it, one of `facts` in which a word or two are not those of any fact. `known` are the ids of all facts.
    """
    strange = [i for i in sentence if i > len(MARKS) and i not in known]
    *fact, mark = dice.choice(facts)
    kind = dice.choice(["words", "beginning", "front"])
    if kind == "words" or not strange:
        return [dice.choice(fact) if i > len(MARKS) and dice.random() < 0.2 else i for i in sentence]
    for place in dice.sample(range(len(fact)), dice.choice([1, 2])):
        fact[place] = dice.choice(strange)
    return fact + (sentence[len(fact):] if kind == "beginning" else [mark] + sentence)


# ---------------------------------------------------------------------------------------------------------------------
# Composing a sample
# ---------------------------------------------------------------------------------------------------------------------

def compose(rng, facts, length, background, band=(0.0, 1.0)):
    """
    Scatter `facts` (lists of ids) through background text, `length` words in all (0: the facts alone), as in BABILong:
    a slot before each sentence and one at the end, one slot drawn for each fact, uniformly, and sorted. `band` keeps
    the facts within a part of the text. Returns the context as a list of arrays to be read one after another, and for
    each fact how many tokens stand before it. The arrays are views of the background, so any length needs no more
    memory than a book. ValueError when the facts alone are longer.
    """
    own = sum(Words.count(fact) for fact in facts)
    if 0 < length < own:
        raise ValueError(f"length: {length} words are too few for facts of {own} words")
    runs = list(background.runs(rng, length - own)) if length else []
    n_slots = sum(last - first for first, last, _ in runs) + 1
    low = min(int(band[0] * n_slots), n_slots - 1)
    slots = np.sort(rng.integers(low, max(int(np.ceil(band[1] * n_slots)), low + 1), size=len(facts)))
    pieces, starts, seen, tokens = [], [], 0, 0                             # seen: sentences of earlier runs

    def add(piece):
        nonlocal tokens
        pieces.append(np.asarray(piece, dtype=np.int64))
        tokens += len(piece)

    def tell(fact):
        starts.append(tokens)
        add(fact)

    for first, last, stop in runs:
        at = background.begin[first]
        while len(starts) < len(facts) and slots[len(starts)] < seen + last - first:
            here = background.begin[first + slots[len(starts)] - seen]
            if here > at:
                add(background.ids[at:here])
            tell(facts[len(starts)])
            at = here
        add(background.ids[at:stop])
        if background.align and tokens % background.align:                  # the last sentence was cut
            add([0] * (-tokens % background.align))
        seen += last - first
    for fact in facts[len(starts):]:
        tell(fact)
    return pieces, starts


class InText:
    """What tasks share that hide something in background text."""

    def __init__(self, words, files=(PROSE,)):
        self.words, self.files = words, files
        self.vocab_size = words.size
        self.background = {}                                                # (files, part) -> Background, once needed

    def text(self, files, part, change=list):
        """The Background of these files, made once."""
        key = (tuple(files), part)
        if key not in self.background:
            self.background[key] = Background(files, part, self.words, change=change)
        return self.background[key]

    def part(self, files):
        """What of the files to evaluate on: what training held back, or all if training has seen none of them."""
        known = {Path(file).name for file in self.files}                    # wherever they lie
        return "val" if known & {Path(file).name for file in files} else "test"

    def show(self, ids):
        return " ".join(self.words.name(i) if i < len(self.words.names) else "~" for i in ids if i)


@lru_cache
def example_lines(part):
    """The lines of some stories of qa1 to qa5: what its texts are made of."""
    return [line for story in babi.simulate(random.Random(0), part, 200) for line in story]


class BABILong(InText):
    """
    The task as train.py and sample.py use it: one or more of bAbI's twenty tasks in background text. A stage is (most
    facts, most words), or (most facts,) where each fact is a segment of its own; the length of an evaluation is its
    words. qa1 to qa5 are simulated and never the published test stories; the others are read from the published files in
    `babi_dir`.
    """
    unit = "words"
    n_questions = 6                     # most questions to one story: reading is dear, asking is cheap

    def __init__(self, words, files=(PROSE,), tasks=("qa1",), babi_dir="", decoys=0.0):
        super().__init__(words, files)
        self.rows, self.parts = tuple(tasks), tuple(dict.fromkeys(tasks))   # a task named twice has twice the rows
        self.babi_dir, self.decoys, self.dice = babi_dir, decoys, random.Random("decoys")
        self.ids, self.samples = {}, {}                     # what was encoded, and which files were read, once
        self.width = None                                   # ids of the longest question, once needed

    def encode(self, text):
        """The ids of a sentence; there are only so many different ones."""
        if text not in self.ids:
            self.ids[text] = self.words.encode(text)
        return self.ids[text]

    def ask(self, text):
        """
        The ids of a question, with blanks in front as far as the longest one of its tasks needs them (qa1 to qa5). A small
        model counts the blanks: it has learned short questions among longer ones, and knows them alone by nothing else.
        """
        if self.width is None:
            lines = [line for part in self.parts if part in babi.TASKS for line in example_lines(part)]
            self.width = max((len(self.encode(line.text)) for line in lines if line.answer is not None), default=0)
        ids = self.encode(text)
        return [0] * (self.width - len(ids)) + ids

    def tell(self, facts):
        """The ids of facts, as they stand in a text."""
        return [self.words.pad(self.encode(fact)) for fact in facts]

    def published(self, part, split, folder):
        """The published samples of a task, spread if `test`. Of the training file the last tenth of the stories is `val`."""
        key = part, split, str(folder)
        if key not in self.samples:
            stories = babi.read_stories(babi.find_file(folder, part, "test" if split == "test" else "train"))
            cut = len(stories) * 9 // 10
            chosen = dict(train=stories[:cut], val=stories[cut:], test=stories)[split]
            self.samples[key] = babi.spread(chosen) if split == "test" else babi.samples(chosen)
        return self.samples[key]

    def vocabulary(self):
        """The words that the tasks use, in lower case: those of some hundred stories (qa6 to qa20: of all tasks)."""
        if set(self.parts) - set(babi.TASKS):
            return set(self.words.ids)
        lines = [line for part in self.parts for line in example_lines(part)]
        return {word.lower() for line in lines for word in self.words.split(f"{line.text} {line.answer or ''}")}

    def training_text(self):
        """The background of training, of which a share, --decoys, looks a little like facts."""
        if not self.decoys or (tuple(self.files), "train") in self.background:
            return self.text(self.files, "train")
        facts = []
        for part in self.rows:
            if part in babi.TASKS:
                facts += [line.text for line in example_lines(part) if line.answer is None]
            else:
                samples = self.published(part, "train", self.babi_dir)
                facts += [fact for sample in samples[:1000] for fact in sample.facts]
        facts = list(map(self.encode, facts))
        known = {i for fact in facts for i in fact}
        return self.text(self.files, "train", lambda sentence: look_alike(self.dice, sentence, facts, known)
                         if self.dice.random() < self.decoys else sentence)

    def story(self, dice, part, n_facts, earlier):
        """
        What a row is told, as texts; what it can be asked from then on, as [(question, answer)]; and what to give as
        `earlier` when it goes on: the events of its world, or the question of a published story.
        """
        if part not in babi.TASKS:
            if earlier:
                return [], [earlier], earlier
            fitting = [s for s in self.published(part, "train", self.babi_dir) if len(s.facts) <= n_facts]
            if not fitting:
                raise ValueError(f"stages: no story of {part} has at most {n_facts} facts")
            sample = dice.choice(fitting)
            return sample.facts, [(sample.question, sample.answer)], [sample.question, sample.answer]
        told = [babi.Event(*event) for event in earlier]
        for _ in range(10000):
            new = list(itertools.islice(babi.world(dice, part, told), n_facts))
            events = told + new
            found = [ask for about in babi.subjects(part, events) for ask in babi.asks(part, events, about)]
            if found and part in EASIER:                                # the rest of the questions are of what it builds on
                found = dice.sample(found, min(len(found), self.n_questions - 2))
                easier = [ask for other in EASIER[part] for about in babi.subjects(other, events)
                          for ask in babi.asks(other, events, about)]
                found += dice.sample(easier, min(len(easier), self.n_questions - len(found)))
            texts = [event.text for event in events]
            if (told or found) and not any(babi.is_published(texts[start:]) for start in {0, len(told)}):
                return texts[len(told):], [(a.question, a.answer) for a in found], list(map(list, events[-300:]))
        raise ValueError(f"stages: {n_facts} facts are too few for a question of {part}")

    def batch(self, rng, size, stage, earlier=None):
        """
        `size` stories in texts of about one length -> Batch, with up to six of the questions that each can answer.
        `earlier` has for each row what it goes on from, or None. A row that goes on is told nothing new half of the
        time: the old has to be kept.
        """
        most_facts, *most_words = stage
        dice = random.Random(int(rng.integers(2 ** 62)))        # its throws take a tenth of the time of numpy's
        n_facts = int(rng.integers(min(2, most_facts), most_facts + 1))
        length = int(sum(most_words) * rng.random() ** 2)       # short ones more often than long
        length = max(length, int(earlier is not None))          # and never nothing at all
        rows, stories = [], []
        questions, answers = [], np.full((size, self.n_questions), -1)
        for i in range(size):
            # A row keeps its task: a text that failed makes way for one of its own kind, or what is hard dies out.
            part, old = earlier[i] if earlier and earlier[i] else (self.rows[i % len(self.rows)], [])
            least = 3 if part == "qa3" else 1
            silent = bool(old) and dice.random() < 0.5
            told = 0 if silent else max(least, n_facts) if part in babi.TASKS else most_facts
            facts, found, new = self.story(dice, part, told, old)
            facts = self.tell(facts)
            if most_words:
                own = sum(map(Words.count, facts)) if length else 0
                facts = compose(rng, facts, max(length, own), self.training_text())[0]
            rows.append(facts)
            stories.append([part, new])
            found = dice.sample(found, min(len(found), self.n_questions))
            questions += [self.ask(q) for q, _ in found] + [[]] * (self.n_questions - len(found))
            answers[i, :len(found)] = [self.words.id(answer) for _, answer in found]
        questions = fill(questions).reshape(size, self.n_questions, -1)
        if most_words:
            return Batch(fill([np.concatenate(pieces) for pieces in rows]), questions, answers, stories)
        most = max(1, *map(len, rows))
        flat = fill([fact for facts in rows for fact in [[]] * (most - len(facts)) + facts])
        return Batch(flat.reshape(size, most, -1), questions, answers, stories)

    def released(self, file):
        """
        The samples of a file as BABILong is released: a JSON list, or one JSON object a line, each with input, question
        and target. ValueError with file and number for a sample that lacks one of them or has an unknown target.
        """
        text, out = read_text(file, "test"), []
        try:
            lines = [line for line in text.splitlines() if line.strip()]
            samples = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, lines))
        except ValueError as e:
            raise ValueError(f"{file}: not JSON ({e})") from None
        for i, sample in enumerate(samples, start=1):
            parts = [sample.get(name) for name in ("input", "question", "target")] if isinstance(sample, dict) else [None]
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{file}, sample {i}: expected the texts input, question and target")
            answer = self.words.ids.get(sample["target"].strip().lower())
            if answer is None:
                raise ValueError(f"{file}, sample {i}: '{sample['target'][:40]}' is no answer of bAbI's twenty tasks")
            context = np.array(self.words.pad(self.words.encode(sample["input"])), dtype=np.int64)
            out.append(Question([context], self.ask(sample["question"]), answer))
        return out

    def typical_length(self, file):
        """How many words the samples of a released file have on average."""
        questions = self.released(file)
        return round(sum(Words.count(q.context[0]) for q in questions) / max(1, len(questions)))

    def questions(self, length, n, babi_dir="", files=None, part=None, band=(0.0, 1.0)):
        """
        Up to n questions of one part in `length` words, and how many stories were left out because they are longer
        than that. With `babi_dir` the published test questions, else simulated ones (qa6 to qa20: of the last tenth of
        the training file); in the passages held back from training, or in `files`, whole, where these are other files. `band`
        confines the facts to a part of the text. The same questions and places for every model; the first n published
        ones are of n stories.
        """
        files, part = files or self.files, part or self.parts[0]
        if babi_dir:
            samples = self.published(part, "test", babi_dir)[:n]
        elif part in babi.TASKS:
            dice = random.Random(f"val {part}")
            samples = babi.samples(babi.simulate(dice, part, n if part == "qa4" else -(-n // 5)))[:n]
        else:
            samples = self.published(part, "val", self.babi_dir)[:n]
        out = []
        for i, sample in enumerate(samples):
            facts = self.tell(sample.facts)
            if not 0 < length < sum(map(Words.count, facts)):
                rng, background = generator(0, "test", length, i), self.text(files, self.part(files))
                context, starts = compose(rng, facts, length, background, band)
                depth = min(starts[i] for i in sample.support) / max(1, sum(map(len, context)))
                out.append(Question(context, self.ask(sample.question), self.words.id(sample.answer), depth))
        return out, len(samples) - len(out)
