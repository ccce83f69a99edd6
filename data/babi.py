"""
bAbI (Weston et al. 2015, arXiv 1502.05698): short worlds of people who move about, and questions.

The published files (v1.2) are read and checked line by line. For the first five tasks there is also a
simulator, so that a model can be trained on as many stories as it likes and never see a published one. Its
rules were inferred from the published files: the generator that made them is not public.
"""
import itertools
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

# The words of the first five tasks, and the answer where a text does not say. A run's config.json keeps them.
UNKNOWN = "unknown"
WORDS = """
Mary moved to the bathroom John went hallway where is Daniel back Sandra garden office journeyed travelled
bedroom kitchen got milk there football put down discarded grabbed took dropped left picked up apple was
before east of west what north south Fred gave Jeff did give Bill who handed received passed
""".split() + [UNKNOWN]


class Line(NamedTuple):
    """A line of a story. A fact has only a text; a question has an answer and supporting line numbers."""
    text: str
    answer: str | None = None
    support: tuple = ()


class Sample(NamedTuple):
    """One question, and all that was told before it."""
    facts: list
    question: str
    answer: str


# --- The published files ------------------------------------------------------------------------------------

LINE = re.compile(r"([1-9]\d*) (?:([^\t?]*[^\t? ])|([^\t]*\? ?)\t([^\t]*[^\t ])\t(\d+(?: \d+)*))")


def read_stories(path):
    """
    A published bAbI file -> list of stories, each a list of Line. ValueError with file and line for anything
    malformed: numbers that do not count up from 1, a question without answer or support, support that is not
    an earlier fact, text that is not UTF-8, a file without questions.
    """
    stories = []
    whole = Path(path).read_text(encoding="utf-8-sig", errors="replace")     # "\ufffd" for what is not UTF-8
    for n, line in enumerate(whole.removesuffix("\n").split("\n"), start=1):
        parts = LINE.fullmatch(line)
        if "\ufffd" in line or not parts:
            raise ValueError(f"{path}, line {n}: expected 'NUMBER fact' or 'NUMBER question?<TAB>answer<TAB>"
                             f"supporting line numbers', found {line[:60]!r}")
        number, fact, question, answer, support = parts.groups(default="")
        if number == "1":
            stories.append([])
        due = len(stories[-1]) + 1 if stories else 1
        if int(number) != due:
            raise ValueError(f"{path}, line {n}: the line is numbered {number}, expected {due}")
        support = tuple(map(int, support.split()))
        for s in support:
            if not 1 <= s <= len(stories[-1]) or stories[-1][s - 1].answer is not None:
                raise ValueError(f"{path}, line {n}: support {s} is not an earlier fact of the story")
        stories[-1].append(Line(fact or question, answer or None, support))
    if not any(line.answer for story in stories for line in story):
        raise ValueError(f"{path}: there is no question in it")
    return stories


def story_samples(story):
    """One Sample per question: it sees all earlier facts of its story and none of the earlier questions."""
    return [Sample([fact.text for fact in story[:i] if fact.answer is None], line.text.strip(), line.answer)
            for i, line in enumerate(story) if line.answer is not None]


def spread(stories):
    """
    One question of every story, then another of every story, and so on; story i starts with its question i,
    so the first n mix early and late questions. (BABILong's files have five questions of a story in a row.)
    """
    each = list(map(story_samples, stories))
    rounds = max(map(len, each), default=0)
    return [own[(i + r) % len(own)] for r in range(rounds) for i, own in enumerate(each) if r < len(own)]


# The crc32 of the facts before each question of the published test files of qa1 to qa5.
PUBLISHED = set(np.load(Path(__file__).parent / "published.npy").tolist())


def is_published(facts):
    return zlib.crc32("\n".join(facts).encode()) in PUBLISHED


def find_file(folder, task):
    """The file `qa1_*_test.txt` in `folder` or in its `en-10k`."""
    for found in (*Path(folder).glob(f"{task}_*_test.txt"), *Path(folder).glob(f"en-10k/{task}_*_test.txt")):
        return found
    raise ValueError(f"--babi_dir: no {task}_*_test.txt in {folder} or in {Path(folder) / 'en-10k'}")


# --- The worlds of qa1 to qa5 -------------------------------------------------------------------------------

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")                             # those that can be simulated
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
THINGS = ["apple", "football", "milk"]                           # the order matters for gifts, here and below
ACTORS = ["Mary", "John", "Daniel", "Sandra"]
GIVERS = ["Mary", "Fred", "Bill", "Jeff"]                               # the actors of qa5
VERBS = dict(move=["went", "journeyed", "travelled", "moved", "went back"],
             get=["picked up", "got", "grabbed", "took"],
             drop=["dropped", "left", "put down", "discarded"],
             give=["gave", "passed", "handed"])
OPPOSITE = dict(north="south", south="north", east="west", west="east")
WINDOW = 5                                                       # a question is about one of the last 5 facts


class Event(NamedTuple):
    """
    One fact. A move leads to a place; get, drop and give are about a thing, and what is given goes `to`
    somebody. In qa4 nobody acts: `who` is a place that `lies` in direction `what` of another `place`.
    """
    action: str
    who: str
    what: str = ""
    place: str = ""
    to: str = ""
    text: str = ""


class Ask(NamedTuple):
    """A question, its answer, indices of the facts that tell it, its weight among those of its subject."""
    question: str
    answer: str
    support: tuple
    weight: float = 1.0


def world(dice, task):
    """
    The events of a world, without end (qa4: two). `dice` is a random.Random. Initial places are hidden, so
    somebody may get a thing before anybody knows where he is.
    """
    if task == "qa4":
        yield from relations(dice)
        return
    actors = GIVERS if task == "qa5" else ACTORS
    things = [] if task == "qa1" else THINGS
    at = {name: dice.choice(PLACES) for name in [*actors, *things]}      # what is held is at its holder

    def attempt():
        """Somebody wants to do something. None if it cannot be done: then the dice are thrown again."""
        who, action = dice.choice(actors), dice.choice(["move", "get", "drop"])
        if action == "move":
            place = dice.choice(PLACES)
            return Event(action, who, place=place) if place != at[who] else None
        within_reach = [what for what in things if at[what] == (at[who] if action == "get" else who)]
        return Event(action, who, dice.choice(within_reach)) if within_reach else None

    def gift():
        """Whoever is not alone may give his first thing to the first other; a gift may only be given on."""
        can, gifts = {}, [last.what] if last and last.action == "give" else things
        for who, what, to in itertools.product(actors, gifts, actors):
            if at[what] == who != to and at[to] == at[who]:
                can.setdefault(who, Event("give", who, what, to=to))
        return dice.choice(list(can.values())) if can and dice.random() < 0.42 else None

    last = None
    while True:
        event = gift() if task == "qa5" else None
        while event is None:
            event = attempt()
        action, who, what, place, to, _ = event
        at[what or who] = dict(move=place, get=who, drop=at[who], give=to)[action]
        last = event._replace(text=sentence(dice, task, event))
        yield last


def sentence(dice, task, event):
    """One of the ways to tell an event."""
    verb = dice.choice(VERBS[event.action])
    if event.action == "move":
        return f"{event.who} {verb} to the {event.place}."
    if event.action == "give":
        return f"{event.who} {verb} the {event.what} to {event.to}."
    always = event.action == "get" and task in ("qa2", "qa5")
    there = " there" if always or dice.random() < 0.2 else ""
    return f"{event.who} {verb} the {event.what}{there}."


def relations(dice):
    """qa4: two places on opposite sides of a third, each told from its own side or from the other."""
    centre, *others = dice.sample(PLACES, 3)
    direction, events = dice.choice(list(OPPOSITE)), []
    for place, side in zip(others, (direction, OPPOSITE[direction])):
        a, side, b = (place, side, centre) if dice.random() < 2 / 3 else (centre, OPPOSITE[side], place)
        events.append(Event("lies", a, side, b, text=f"The {a} is {side} of the {b}."))
    return events if dice.random() < 0.5 else events[::-1]


def subject(task, event):
    """What a question might ask because of this event: an actor (qa1), a thing, an event of qa4, or None."""
    if task == "qa1":
        return event.who                                        # in qa1 all events are moves
    if task == "qa4":
        return event
    return event.what if event.action in (("give",) if task == "qa5" else ("get", "drop")) else None


def asks(task, events, about):
    """All that can be asked about a subject of the events, and is answered by them: a list of Ask."""
    last = next(i for i in reversed(range(len(events))) if subject(task, events[i]) == about)
    action, who, what, place, to, _ = events[last]
    if task == "qa1":
        return [Ask(f"Where is {who}? ", place, (last,))]
    if task == "qa4":
        return [Ask(f"What is {what} of the {place}?", who, (last,)),
                Ask(f"What is the {place} {OPPOSITE[what]} of?", who, (last,))]
    if task == "qa5":
        return [Ask(f"What did {who} give to {to}? ", about, (last,), 1 / 3),
                Ask(f"Who gave the {about}? ", who, (last,), 1 / 6),
                Ask(f"Who gave the {about} to {to}? ", who, (last,), 1 / 6),
                Ask(f"Who did {who} give the {about} to? ", to, (last,), 1 / 6),
                Ask(f"Who received the {about}? ", to, (last,), 1 / 6)]
    end = last if action == "drop" else len(events)                   # from here on the thing was not carried
    moves = [i for i in range(end) if events[i].action == "move" and events[i].who == who]
    if task == "qa2":
        return [Ask(f"Where is the {about}? ", events[move].place, (last, move))
                for move in moves[-1:] if action == "drop" or move > last]
    got = next(i for i in reversed(range(last + 1)) if events[i].action == "get" and events[i].what == about)
    way = [i for i in moves if i > got]
    places = [events[i].place for i in way]                       # the thing was carried to these, one by one
    return [Ask(f"Where was the {about} before the {places[j]}? ", places[j - 1], (last, way[j], way[j - 1]),
                0.75 ** (len(way) - 1 - j))
            for j in range(1, len(way)) if places[j] not in places[j + 1:]]


def subjects(task, events):
    """All different subjects of the events."""
    return list(dict.fromkeys(s for event in events if (s := subject(task, event)) is not None))


def question(dice, task, events):
    """
    The question that the published stories would ask after these events, or None if they would go on: about
    the subject of one of the last facts, drawn among those facts whose subject can be asked about.
    """
    recent = {about: asks(task, events, about) for about in subjects(task, events[-WINDOW:])}
    named = [about for event in events[-WINDOW:] if recent.get(about := subject(task, event))]
    if not named:
        return None
    found = recent[dice.choice(named)]
    return dice.choices(found, [ask.weight for ask in found])[0]


def simulate(dice, task, n_stories):
    """Stories as published: two facts, a question if there is one, and so on to the fifth (qa4: first)."""
    stories = []
    for _ in range(n_stories):
        source, story, events, questions = world(dice, task), [], [], 1 if task == "qa4" else 5
        while questions:
            events += itertools.islice(source, 2)
            story += [Line(event.text) for event in events[-2:]]
            if ask := question(dice, task, events):
                line_of = [n for n, line in enumerate(story, start=1) if line.answer is None]
                story.append(Line(ask.question, ask.answer, tuple(line_of[i] for i in ask.support)))
                questions -= 1
        stories.append(story)
    return stories


# --- All that a text answers --------------------------------------------------------------------------------

PEOPLE = dict.fromkeys([*ACTORS, *GIVERS])
QUESTIONS = dict(                                     # in the order from which a training story draws
    qa1=[f"Where is {who}? " for who in PEOPLE],
    qa2=[f"Where is the {what}? " for what in THINGS],
    qa3=[f"Where was the {what} before the {place}? " for what in THINGS for place in PLACES],
    qa4=[question for side in OPPOSITE for place in PLACES for question in (
        f"What is {side} of the {place}?", f"What is the {place} {OPPOSITE[side]} of?")],
    qa5=[question for a in PEOPLE for what in THINGS for question in (                # some more than once
        f"Who gave the {what}? ", f"Who received the {what}? ", f"Who gave the {what} to {a}? ",
        f"Who did {a} give the {what} to? ", *(f"What did {a} give to {b}? " for b in PEOPLE if a != b))])


def everything(events):
    """
    All QUESTIONS about all people, things and places: {task: {question: answer}}, UNKNOWN where the events do
    not say. A thing is where its holder is; whoever picks it up is where it lay, whoever is given it is where
    the giver is.
    """
    at = {who: who for who in PEOPLE}           # a place, or who was there at first, if it is not named yet
    holder, way, known = {}, {}, {}             # way: all spots where a thing has been, one by one

    def meet(a, b):
        """The spots a and b prove to be the same."""
        a, b = sorted((a, b), key=PLACES.__contains__)
        at.update({who: b for who in at if at[who] == a})
        way.update({thing: [b if spot == a else spot for spot in spots] for thing, spots in way.items()})

    for event in events:
        action, who, what, place, to, _ = event
        if action == "lies":
            for side in (event, Event("lies", place, OPPOSITE[what], who)):
                known.update(ask[:2] for ask in asks("qa4", [side], side))
        elif action == "move":
            at[who] = place
            way.update({thing: [*spots, place] for thing, spots in way.items() if holder[thing] == who})
        else:
            if action == "give":
                meet(at[who], at[to])
                known.update(ask[:2] for ask in asks("qa5", [event], what))
            elif action == "get" and what in way and not holder[what]:
                meet(at[who], way[what][-1])
            holder[what] = dict(get=who, drop=None, give=to)[action]
            way[what] = [*way.get(what, []), at[who]]
    named = lambda spot: spot if spot in PLACES else UNKNOWN
    known.update((f"Where is {who}? ", named(spot)) for who, spot in at.items())
    for thing, spots in way.items():
        spots = [spot for spot, _ in itertools.groupby(spots)]
        known[f"Where is the {thing}? "] = named(spots[-1])
        known.update((f"Where was the {thing} before the {spot}? ", named(before))      # its last stay there
                     for before, spot in itertools.pairwise(spots))
    return {task: {question: known.get(question, UNKNOWN) for question in asked}
            for task, asked in QUESTIONS.items()}
