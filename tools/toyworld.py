"""The built-in data: a small world of facts, written in the real file formats.

    python -m tools.toyworld --out_dir=data/toyworld
    python -m tools.toyworld --seed=7 --repeats=10 --out_dir=data/small

Writes into out_dir:
    docs.parquet         short texts and stories that tell every fact and
                         contain no question (FineWeb-Edu's columns)
    instruct.json        questions and answers about four fifths of the facts,
                         and a few general ones (Alpaca's fields)
    preferences.json     a question about each of these facts; the chosen
                         answer is brief, the rejected one wordy or rude
    hellaswag_val.jsonl  beginnings of statements, each with four endings of
                         which one is right (HellaSwag's fields)
    questions.json       questions and answers about the last fifth, the
                         held-out facts, which no other file asks about

The same seed and repeats write the same bytes (with the same pyarrow).
"""

import json
import random
import re
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for `python tools/toyworld.py`

from configurator import BadInput, configure

out_dir = "data/toyworld"  # folder to write into; its files of the same names are replaced
seed = 1337  # of everything random: wordings, order, and which facts are held out
repeats = 30  # passes of the docs over all facts, each of which tells a fact about twice; 30 passes are 0.9 MB

HELDOUT = 1 / 5  # share of the facts of each relation
STORY = 0.4  # share of facts told as an opening and then the plain statement, else by any statement
N_HELLASWAG = 240  # items, each about another fact
NAMES = "Anna Ben Carla David Eva Felix Grace Hugo Ida Jonas Kim Leo Maria Nico Olga Paul Rosa Sam Tina Victor".split()

# country: capital, continent, language
COUNTRIES = """
France: Paris, Europe, French; Spain: Madrid, Europe, Spanish; Portugal: Lisbon, Europe, Portuguese;
Italy: Rome, Europe, Italian; Germany: Berlin, Europe, German; Austria: Vienna, Europe, German;
Poland: Warsaw, Europe, Polish; Greece: Athens, Europe, Greek; Sweden: Stockholm, Europe, Swedish;
Norway: Oslo, Europe, Norwegian; Finland: Helsinki, Europe, Finnish; Hungary: Budapest, Europe, Hungarian;
Bulgaria: Sofia, Europe, Bulgarian; Croatia: Zagreb, Europe, Croatian; Ukraine: Kyiv, Europe, Ukrainian;
England: London, Europe, English; Japan: Tokyo, Asia, Japanese; China: Beijing, Asia, Chinese;
South Korea: Seoul, Asia, Korean; Vietnam: Hanoi, Asia, Vietnamese; Thailand: Bangkok, Asia, Thai;
Mongolia: Ulaanbaatar, Asia, Mongolian; Iran: Tehran, Asia, Persian; Iraq: Baghdad, Asia, Arabic;
Nepal: Kathmandu, Asia, Nepali; Cambodia: Phnom Penh, Asia, Khmer; Pakistan: Islamabad, Asia, Urdu;
Egypt: Cairo, Africa, Arabic; Kenya: Nairobi, Africa, Swahili; Ghana: Accra, Africa, English;
Ethiopia: Addis Ababa, Africa, Amharic; Somalia: Mogadishu, Africa, Somali; Senegal: Dakar, Africa, French;
Angola: Luanda, Africa, Portuguese; Madagascar: Antananarivo, Africa, Malagasy; Peru: Lima, South America, Spanish;
Chile: Santiago, South America, Spanish; Argentina: Buenos Aires, South America, Spanish;
Brazil: Brasilia, South America, Portuguese; Cuba: Havana, North America, Spanish;
Canada: Ottawa, North America, English; Jamaica: Kingston, North America, English;
Australia: Canberra, Oceania, English; New Zealand: Wellington, Oceania, English"""

# animal: kind, legs, food
ANIMALS = """
cat: mammal, four, mice; dog: mammal, four, meat; panda: mammal, four, bamboo; cow: mammal, four, grass;
horse: mammal, four, hay; rabbit: mammal, four, clover; squirrel: mammal, four, nuts; koala: mammal, four, leaves;
tiger: mammal, four, deer; lion: mammal, four, zebras; bear: mammal, four, honey; monkey: mammal, four, bananas;
pig: mammal, four, acorns; beaver: mammal, four, bark; anteater: mammal, four, ants; whale: mammal, no, krill;
eagle: bird, two, snakes; owl: bird, two, voles; parrot: bird, two, seeds; hummingbird: bird, two, nectar;
woodpecker: bird, two, beetles; penguin: bird, two, squid; stork: bird, two, frogs; flamingo: bird, two, algae;
python: reptile, no, rats; crocodile: reptile, four, antelopes; iguana: reptile, four, flowers;
sea turtle: reptile, four, jellyfish; frog: amphibian, four, flies; shark: fish, no, tuna; trout: fish, no, mayflies;
bee: insect, six, pollen; ladybug: insect, six, aphids; mosquito: insect, six, blood; spider: arachnid, eight, moths;
scorpion: arachnid, eight, crickets"""

# thing: color
COLORS = """
the sky: blue; grass: green; snow: white; coal: black; a lemon: yellow; a tomato: red; a carrot: orange; blood: red;
a pumpkin: orange; chocolate: brown; milk: white; the sun: yellow; a ruby: red; an emerald: green; a violet: purple;
an eggplant: purple; a plum: purple; a flamingo: pink; a pig: pink; a swan: white; a crow: black; a strawberry: red;
a blueberry: blue; a banana: yellow; spinach: green; the sea: blue; ash: gray; concrete: gray; an elephant: gray;
lavender: purple"""

# work: author
WORKS = """
'Romeo and Juliet': William Shakespeare; 'Moby Dick': Herman Melville; 'Oliver Twist': Charles Dickens;
'Pinocchio': Carlo Collodi; 'Don Quixote': Miguel de Cervantes; 'War and Peace': Leo Tolstoy; 'Dracula': Bram Stoker;
'Frankenstein': Mary Shelley; 'Emma': Jane Austen; 'Heidi': Johanna Spyri; 'Candide': Voltaire; 'The Odyssey': Homer;
'The Jungle Book': Rudyard Kipling; 'Tom Sawyer': Mark Twain; 'Alice in Wonderland': Lewis Carroll;
'Animal Farm': George Orwell"""

# One block per relation: its name, `!` openings of a story, statements, `?` questions. {s} is the subject, {a} the
# answer, {name} a person, {x} and {y} the two numbers of a sum. The first statement is the form of the answer.
RELATIONS = """
capital
! {name} is on the way to the capital of {s}. | {name} reads about the capital of {s}. | {name} dreams of {s}.
The capital of {s} is {a}. | {s} has a capital called {a}. | The capital city of {s} is {a}. | {s} is governed from {a}.
In {s}, the capital is {a}. | {name} went to {s} and stayed in {a}, the capital. | {a} is the capital of {s}.
To see the capital of {s}, {name} went to {a}. | All over {s} they know that the capital is {a}.
? What is the capital of {s}? | Name the capital of {s}. | Which city is the capital of {s}?
? Tell me the capital of {s}. | What is the capital city of {s}?

continent
! {name} looks for {s} on the map. | {name} reads about the continent of {s}. | {name} is learning about {s}.
{s} is in {a}. | The country {s} is in {a}. | {s} is a country in {a}. | {s} lies in {a}. | {s} is a part of {a}.
The continent of {s} is {a}. | {name} went to {s}, which is in {a}. | In {a} there is a country called {s}.
{s} belongs to {a}. | To see {s}, {name} had to travel to {a}.
? On which continent is {s}? | Which continent is {s} in? | Name the continent of {s}. | Where is {s}?

language
! {name} hears how people in {s} speak. | {name} is learning the language of {s}. | {name} got a letter from {s}.
People in {s} speak {a}. | The language of {s} is {a}. | In {s}, people speak {a}. | In {s}, the language is {a}.
Children in {s} learn {a}. | {name} went to {s} and learned {a}. | Most people in {s} speak {a}.
In {s} you will hear {a}. | {a} is the language of {s}. | Newspapers in {s} are in {a}.
? What language do people in {s} speak? | Which language is spoken in {s}? | What do people speak in {s}?
? Name the language of {s}.

kind
! {name} draws {s}. | {name} sorts {s} by its kind. | {name} likes animals, and above all {s}.
{s} is {a}. | Everyone knows that {s} is {a}. | {name} says that {s} is {a}. | In biology, {s} is {a}.
Of all kinds of animals, {s} is {a}. | {name} learned that {s} is {a}. | The animal called {s} is {a}.
{name} drew {a}: it was {s}. | By its kind, {s} is {a}.
? What kind of animal is {s}? | Which kind of animal is {s}? | Is {s} a mammal, a bird or something else?

legs
! {name} makes a model of {s}. | {name} looks at {s}. | {name} counts the legs of {s}.
{s} has {a} legs. | Everyone knows that {s} has {a} legs. | {name} counted: {s} has {a} legs.
Look at {s}: it has {a} legs. | Nature gave {s} {a} legs. | The body of {s} has {a} legs.
{name} drew {s} with {a} legs. | On {s} you will see {a} legs. | With {a} legs, {s} gets around well.
? How many legs does {s} have? | Tell me how many legs {s} has. | What number of legs does {s} have?

food
! {name} sees {s} at the zoo. | {name} looks for the food of {s}. | {name} wants to feed {s}.
{s} eats {a}. | The food of {s} is {a}. | When it is hungry, {s} eats {a}. | {name} saw how {s} ate {a}.
For dinner, {s} likes {a}. | At the zoo, {s} gets {a}. | {name} fed {s} with {a}. | What {s} loves most is {a}.
{a}: that is the food of {s}. | Every day, {s} eats some {a}.
? What does {s} eat? | What is the food of {s}? | Name the food of {s}. | Tell me what {s} eats.

color
! {name} paints {s}. | {name} describes the color of {s}. | {name} has a photo of {s}.
The color of {s} is {a}. | {s} is {a}. | {name} painted {s} {a}. | In the picture, {s} is {a}.
Everyone can see that {s} is {a}. | For {s}, {name} took {a} paint. | Children draw {s} in {a}.
By day, {s} looks {a}. | {name} took {a} paint for {s}. | By its color, {s} is {a}.
? What color is {s}? | What is the color of {s}? | Name the color of {s}. | Tell me the color of {s}.

author
! {name} found {s} in the library. | {name} reads about the author of {s}. | {name} wants to read {s}.
{s} was written by {a}. | The author of {s} is {a}. | {name} read {s} by {a}. | The book {s} is by {a}.
On the cover of {s} is the name {a}. | The writer of {s} was {a}. | {a} wrote {s}. | {s} is the work of {a}.
{name} loves {s}, a book by {a}. | Long ago, {s} was written by {a}.
? Who wrote {s}? | Who is the author of {s}? | Name the author of {s}. | Tell me who wrote {s}.

sum
! {name} is adding {x} and {y}. | {name} writes {s} on the board. | {name} thinks about {s}.
{s} = {a}. | {s} is {a}. | {s} makes {a}. | The sum {s} is {a}. | If you add {x} and {y}, you get {a}.
{name} had {x} apples, got {y} more, and now has {a}. | {name} counted {s} = {a}. | {x} and {y} make {a}.
{a} is the sum of {x} and {y}. | {name} knows that {s} = {a}.
? What is {s}? | How much is {s}? | Compute {s}. | Tell me the sum {s}."""

# instruction | input | output
GENERAL = """
Say hello. | | Hello!
Say hi. | | Hi!
Say goodbye. | | Goodbye!
Say thank you. | | Thank you!
How are you? | | I am fine, thank you.
Who are you? | | I am a small language model.
What can you do? | | I can answer short questions.
Define 'cat'. | | A cat is a small animal that many people keep at home.
Define 'book'. | | A book is a set of pages that people read.
Define 'city'. | | A city is a place where many people live.
Translate 'hello' to Spanish. | | 'Hello' in Spanish is 'hola'.
Translate 'thank you' to French. | | 'Thank you' in French is 'merci'.
Where is the White House located? | | The White House is in Washington.
What is the boiling point of water? | | Water boils at 100 degrees Celsius.
Summarize the plot of '1984' by George Orwell. | | A man fights a state that watches everyone, and he loses.
How many days are in a week? | | A week has seven days.
What is the opposite of the word? | hot | The opposite of hot is cold.
What is the opposite of the word? | big | The opposite of big is small.
What is the opposite of the word? | day | The opposite of day is night.
Correct the sentence. | he go home | He goes home.
Correct the sentence. | she have a book | She has a book."""

WORDY = """
Oh please, everyone knows that. {answer} | What a silly question. {answer} | {answer} How can you not know that?
Well, let me think about it for a long while, because I like to talk. {answer} | {answer} Do not ask me again.
{answer} I could go on and on about it, as there is so much more to say, and I like to hear myself talk."""


Fact = namedtuple("Fact", "relation subject answer")
Relation = namedtuple("Relation", "openings statements questions")  # lists of patterns


def main():
    if repeats < 1:
        raise BadInput(f"--repeats must be at least 1, not {repeats}")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)

    def rng(purpose):  # one generator per file: changing `repeats` does not change which facts are held out
        return random.Random(f"{seed} {purpose}")

    facts = world_facts()
    relations = parse_relations(RELATIONS)
    known, heldout = hold_out(facts, rng("hold out"))
    docs = make_docs(facts, relations, repeats, rng("docs"))
    write_parquet(folder / "docs.parquet", docs, rng("columns"))
    rows = {
        "instruct.json": make_instruct(known, relations, rng("instruct")),
        "preferences.json": make_preferences(known, relations, rng("preferences")),
        "questions.json": make_questions(heldout, relations, rng("questions")),
    }
    for name, content in rows.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [json.dumps(item) + "\n" for item in make_hellaswag(facts, relations, rng("hellaswag"))]
    (folder / "hellaswag_val.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: {len(facts)} facts ({len(heldout)} held out), {len(docs):,} documents")


def world_facts():
    facts = []
    for country, answers in parse_table(COUNTRIES).items():
        relations = ("capital", "continent", "language")
        facts += [Fact(relation, country, answer) for relation, answer in zip(relations, answers, strict=True)]
    for noun, (kind, legs, food) in parse_table(ANIMALS).items():
        animal = with_article(noun)
        facts += [Fact("kind", animal, with_article(kind)), Fact("legs", animal, legs), Fact("food", animal, food)]
    facts += [Fact("color", thing, color) for thing, [color] in parse_table(COLORS).items()]
    facts += [Fact("author", work, author) for work, [author] in parse_table(WORKS).items()]
    facts += [Fact("sum", f"{x} + {y}", str(x + y)) for x in range(1, 7) for y in range(1, 7)]
    return facts


def parse_table(text):
    """'key: value, value; key: ...' as a dict of lists."""
    rows = [row.split(": ") for row in " ".join(text.split()).split("; ")]
    return {key: values.split(", ") for key, values in rows}


def with_article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def parse_relations(text):
    """The blocks of RELATIONS as {name: Relation}."""
    relations = {}
    for block in text.strip().split("\n\n"):
        name, *lines = block.split("\n")
        relation = Relation(openings=[], statements=[], questions=[])
        marked = {"!": relation.openings, "?": relation.questions}
        for line in lines:
            marked.get(line[0], relation.statements).extend(line.lstrip("!? ").split(" | "))
        relations[name] = relation
    return relations


def hold_out(facts, rng):
    """(known, heldout): a fifth of each relation's facts is held out; 2 + 3 and 3 + 2 stay together."""
    groups = {}
    for fact in facts:
        subject = frozenset(fact.subject.split(" + "))
        groups.setdefault(fact.relation, {}).setdefault(subject, []).append(fact)
    heldout = set()
    for subjects in groups.values():
        for subject in rng.sample(list(subjects), round(HELDOUT * len(subjects))):
            heldout.update(subjects[subject])
    return [fact for fact in facts if fact not in heldout], [fact for fact in facts if fact in heldout]


def make_docs(facts, relations, repeats, rng):
    """Texts that tell each fact about 2 * repeats times: half are about one subject, half about one relation."""
    subjects = {}
    themes = {}
    for fact in facts:
        subjects.setdefault(fact.subject, []).append(fact)
        themes.setdefault(fact.relation, []).append(fact)
    docs = []
    for _ in range(repeats):
        chapters = [rng.sample(told, len(told)) for told in subjects.values()]
        for theme in themes.values():
            order = rng.sample(theme, len(theme))
            chapters += [order[i : i + 4] for i in range(0, len(order), 4)]
        docs += [write_chapter(chapter, relations, rng) for chapter in chapters]
    rng.shuffle(docs)
    return docs


def write_chapter(facts, relations, rng):
    """One text about these facts and one person."""
    name = rng.choice(NAMES)
    sentences = []
    for fact in facts:
        relation = relations[fact.relation]
        patterns = [rng.choice(relation.statements)]
        if len(facts) == 1 or rng.random() < STORY:
            patterns = [rng.choice(relation.openings), relation.statements[0]]
        sentences += [tell(pattern, fact, name) for pattern in patterns]
    return " ".join(sentences)


def tell(pattern, fact, name=""):
    """The sentence that a pattern makes of a fact, with a capital first letter."""
    x, _, y = fact.subject.partition(" + ")  # of a sum
    text = pattern.format(s=fact.subject, a=fact.answer, x=x, y=y, name=name)
    return text[0].upper() + text[1:]


def write_parquet(path, docs, rng):
    """The docs with FineWeb-Edu's other columns, whose values are made up."""
    import pyarrow
    import pyarrow.parquet

    scores = [rng.uniform(3, 5) for _ in docs]
    columns = {
        "text": docs,
        "id": [f"<urn:uuid:{rng.getrandbits(128):032x}>" for _ in docs],
        "dump": ["TOYWORLD"] * len(docs),
        "url": [f"https://toyworld.example/{number}" for number in range(len(docs))],
        "file_path": ["tools/toyworld.py"] * len(docs),
        "language": ["en"] * len(docs),
        "language_score": [1.0] * len(docs),
        "token_count": [len(text) // 4 for text in docs],  # GPT-2 tokens, roughly
        "score": scores,
        "int_score": [round(score) for score in scores],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def make_instruct(known, relations, rng):
    """Alpaca rows: every question about each known fact, and the general ones, in random order."""
    rows = [[part.strip() for part in line.split("|")] for line in GENERAL.strip().split("\n")]
    for fact in known:
        answer = tell(relations[fact.relation].statements[0], fact)
        rows += [[tell(question, fact), "", answer] for question in relations[fact.relation].questions]
    rng.shuffle(rows)
    return [{"instruction": instruction, "input": given, "output": output} for instruction, given, output in rows]


def make_preferences(known, relations, rng):
    """One pair per known fact: the bare answer is chosen, the same answer in a wordy or rude wrapping rejected."""
    wrappings = WORDY.strip().replace("\n", " | ").split(" | ")
    rows = []
    for fact in rng.sample(known, len(known)):
        question, chosen = ask(fact, relations, rng)
        rejected = rng.choice(wrappings).format(answer=chosen)
        rows.append({"instruction": question, "input": "", "chosen": chosen, "rejected": rejected})
    return rows


def ask(fact, relations, rng):
    """(one of the questions about a fact, its answer)."""
    relation = relations[fact.relation]
    return tell(rng.choice(relation.questions), fact), tell(relation.statements[0], fact)


def make_questions(heldout, relations, rng):
    """A {question, answer} for each held-out fact."""
    rows = [ask(fact, relations, rng) for fact in heldout]
    return [{"question": question, "answer": answer} for question, answer in rows]


def make_hellaswag(facts, relations, rng):
    """HellaSwag items: an opening and the start of a statement; endings are answers of one relation, one is true."""
    items = []
    for number, fact in enumerate(rng.sample(facts, N_HELLASWAG)):
        relation = relations[fact.relation]
        # Not the first statement, which is the one that follows an opening in the docs. The context ends before the
        # answer, so the subject ({s}, or {y} of a sum) must come earlier.
        pattern = rng.choice([p for p in relation.statements[1:] if re.search(r"\{[sy]\}.*\{a\}", p)])
        start, _, rest = pattern.partition("{a}")
        name = rng.choice(NAMES)
        ctx_a = tell(rng.choice(relation.openings), fact, name)
        ctx_b = tell(start.strip(), fact, name)
        wrong = sorted({other.answer for other in facts if other.relation == fact.relation} - {fact.answer})
        label = number % 4
        answers = rng.sample(wrong, 3)
        answers.insert(label, fact.answer)
        item = dict(
            ind=number, activity_label=fact.relation.capitalize(), ctx_a=ctx_a, ctx_b=ctx_b, ctx=f"{ctx_a} {ctx_b}",
            endings=[answer + rest for answer in answers], source_id=f"toyworld~{number}", split="val",
            split_type="indomain", label=label,
        )  # fmt: skip
        items.append(item)
    return items


if __name__ == "__main__":
    configure(globals())
    main()
