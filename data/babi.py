"""
bAbI (Weston et al. 2015, arXiv 1502.05698): short worlds in which people move about, and questions about them.

The published files (v1.2) are read and written byte for byte. For qa1, "Where is Mary?", there is also a simulator,
so that a model can be trained on as many stories as it likes and never see a published one. Its rules were inferred
from the published files: the generator that made them is not public.
"""
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

# All words and answers of the twenty tasks in en-10k, in order of appearance. Their ids are fixed for good, so a
# checkpoint stays valid when tasks are added; an answer that is a list, or a path, is one word here.
WORDS = """
Mary moved to the bathroom John went hallway where is Daniel back Sandra garden office journeyed travelled bedroom
kitchen got milk there football put down discarded grabbed took dropped left picked up apple was before east of west
what north south Fred gave Jeff did give Bill who handed received passed in how many objects carrying no longer not
either school or park cinema Julie after that he following then she afterwards and they this morning afternoon
yesterday evening mice are afraid wolves Gertrude a mouse cats sheep Winona Emily Jessica wolf cat Lily frog Bernhard
green Brian lion white Julius swan Greg color rhino gray yellow pink rectangle triangle red square right below blue
above sphere suitcase fits inside box chocolate container bigger than chocolates chest does fit do you go from Jason
thirsty will Antoine bored why Sumit hungry get Yann tired pajamas yes none one two three nothing maybe
apple,football apple,milk football,apple football,milk milk,apple milk,football apple,football,milk
apple,milk,football football,apple,milk football,milk,apple milk,apple,football milk,football,apple
e,e e,n e,s n,e n,n n,w s,e s,s s,w w,n w,s w,w
""".split()

ACTORS = ["Mary", "John", "Daniel", "Sandra"]
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
MOVES = ["went", "journeyed", "travelled", "moved", "went back"]


class Line(NamedTuple):
    """One line of a story. A fact has only a text; a question has an answer and the line numbers that support it."""
    text: str
    answer: str | None = None
    support: tuple = ()


class Sample(NamedTuple):
    """One question, and all that was told before it."""
    facts: list
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# The published files
# ---------------------------------------------------------------------------------------------------------------------

def read_stories(path):
    """
    A published bAbI file -> list of stories, each a list of Line. ValueError with file and line for anything malformed:
    a line without a number, numbers that do not count up from 1, a question without answer or support, support that
    is not an earlier fact, text that is not UTF-8, an empty file.
    """
    stories = []
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text (byte {e.start}); is this a bAbI file?") from None
    if lines == [""]:
        raise ValueError(f"{path}: the file is empty")
    for n, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        def fail(why):
            raise ValueError(f"{path}, line {n}: {why}")
        number, _, rest = line.partition(" ")
        if line.endswith("\r"):
            fail("a carriage return at its end; the published files end lines with a newline alone")
        if not re.fullmatch("[1-9][0-9]*", number) or not rest:
            fail(f"expected 'NUMBER text', found {line[:60]!r}")
        if int(number) == 1:
            stories.append([])
        if not stories or int(number) != len(stories[-1]) + 1:
            fail(f"the line is numbered {number}, expected {len(stories[-1]) + 1 if stories else 1}")
        story = stories[-1]
        fields = rest.split("\t")
        if len(fields) == 1:
            if rest.rstrip().endswith("?"):
                fail("a question without a TAB and an answer")
            story.append(Line(rest))
            continue
        if len(fields) != 3 or not fields[0].rstrip().endswith("?") or not fields[1].strip():
            fail("a question reads 'question?<TAB>answer<TAB>supporting line numbers'")
        if not re.fullmatch(r"\d+( \d+)*", fields[2]):
            fail(f"supporting line numbers expected, found {fields[2][:60]!r}")
        support = tuple(map(int, fields[2].split(" ")))
        for s in support:
            if not 1 <= s <= len(story):
                fail(f"support {s} is not an earlier line of the story")
            if story[s - 1].answer is not None:
                fail(f"support {s} is a question, not a fact")
        story.append(Line(fields[0], fields[1], support))
    return stories


def write_stories(stories):
    """The text of a bAbI file, the exact inverse of read_stories."""
    def show(line):
        return line.text if line.answer is None else f"{line.text}\t{line.answer}\t{' '.join(map(str, line.support))}"
    return "".join(f"{n} {show(line)}\n" for story in stories for n, line in enumerate(story, start=1))


def samples(stories):
    """One Sample per question: it sees all earlier facts of its story and none of the earlier questions."""
    out = []
    for story in stories:
        facts = []
        for line in story:
            if line.answer is None:
                facts.append(line.text)
            else:
                out.append(Sample(list(facts), line.text.strip(), line.answer))
    return out


def find_file(folder, task, split="test"):
    """The file `qa1_*_test.txt` in `folder`, or in the `en-10k` inside it. FileNotFoundError says where it looked."""
    for place in (Path(folder), Path(folder) / "en-10k"):
        found = sorted(place.glob(f"{task}_*_{split}.txt"))
        if found:
            return found[0]
    raise FileNotFoundError(f"babi_dir: no {task}_*_{split}.txt in {folder} or in {Path(folder) / 'en-10k'}")


# ---------------------------------------------------------------------------------------------------------------------
# The world of qa1
# ---------------------------------------------------------------------------------------------------------------------

def qa1_facts(rng, size, n_facts):
    """
    Simulate `size` worlds for `n_facts` moves: (actor, place, move), each (B, F) indices into ACTORS, PLACES, MOVES.
    Who moves is uniform and independent; where to is uniform over the five places he is not at; the start is hidden.
    """
    actor = rng.integers(len(ACTORS), size=(size, n_facts))                                             # (B, F)
    move = rng.integers(len(MOVES), size=(size, n_facts))                                               # (B, F)
    step = rng.integers(1, len(PLACES), size=(size, n_facts))                       # how far round the circle of places
    at = rng.integers(len(PLACES), size=(size, len(ACTORS)))                        # where everybody is, hidden at first
    place = np.empty_like(actor)
    rows = np.arange(size)
    for f in range(n_facts):
        at[rows, actor[:, f]] += step[:, f]
        place[:, f] = at[rows, actor[:, f]] % len(PLACES)
    return actor, place, move


def last_places(actor, place):
    """Where everybody was last told to be: (B, F) and (B, F) -> (B, 4) indices into PLACES, -1 for the never seen."""
    at = np.full((len(actor), len(ACTORS)), -1)
    at[np.arange(len(actor))[:, None], actor] = place                               # numpy keeps the last of equal indices
    return at


def qa1_fact(actor, place, move):
    return f"{ACTORS[actor]} {MOVES[move]} to the {PLACES[place]}."


def qa1_stories(rng, n_stories, window=5):
    """
    Stories as in the published files: five times two moves and a question. Asked is the actor of one of the last
    `window` facts, drawn uniformly (so an actor who moved long ago is never asked).
    """
    stories = []
    for actor, place, move in zip(*qa1_facts(rng, n_stories, 10)):
        story, line_of = [], []                                     # line_of[f] is the line number of fact f
        for f in range(10):
            story.append(Line(qa1_fact(actor[f], place[f], move[f])))
            line_of.append(len(story))
            if f % 2:
                who = actor[rng.integers(max(0, f + 1 - window), f + 1)]
                latest = max(g for g in range(f + 1) if actor[g] == who)
                story.append(Line(f"Where is {ACTORS[who]}? ", PLACES[place[latest]], (line_of[latest],)))
        stories.append(story)
    return stories
