"""The language that `demo` knows: a closed vocabulary, a small grammar, and random word order.

Half of the sentences come from the grammar, half are words in random order, so that the decoder
has to listen and cannot guess. No two words sound alike (here/hear, for/four, red/read): in random
order nothing could tell them apart; `tests/test_demo.py` asks a synthesizer for their phonemes.
Every function takes a `random.Random`: one seed, one corpus.
"""

from __future__ import annotations

import random

DETERMINERS = "the a this that every each some any another my your our his these".split()
ADJECTIVES = (
    "red blue green black white small big old new quiet loud fast slow cold warm bright dark young "
    "long short brown yellow purple orange golden silver heavy light empty full open clean dirty "
    "happy sad angry gentle brave clever foolish honest kind lazy proud shy strong weak rich poor "
    "sharp flat round square wide narrow deep shallow high low thick thin soft hard smooth rough "
    "sweet bitter salty fresh dry wet hot cool early late first last next other same different "
    "simple difficult easy useful common rare famous hidden broken missing wrong right true false "
    "human modern ancient public private perfect ordinary strange beautiful ugly careful careless "
    "expensive cheap safe dangerous possible certain final linear constant random equal exact "
    "hungry thirsty sleepy lonely friendly polite nervous silent sudden tiny giant enormous "
    "wooden plastic digital electric magnetic vertical central local national foreign"
).split()
NOUNS = (
    "cat dog bird horse house garden river window door table book letter song voice word signal "
    "layer model number machine teacher doctor child city road train ship tree stone morning "
    "evening summer winter water fire music question answer apple banana bread butter cheese "
    "chicken coffee dinner kitchen lemon onion pepper potato salad sandwich soup sugar tomato "
    "vegetable breakfast bottle basket blanket bucket button candle carpet ceiling chair clock "
    "curtain cushion drawer hammer handle ladder lamp mirror needle paper pencil picture pillow "
    "pocket ribbon scissors shelf shirt jacket shoe spoon towel umbrella wallet airport bridge "
    "building castle church corner factory farm forest harbor hospital hotel island library "
    "market mountain museum office palace prison restaurant school station street theater tower "
    "tunnel valley village animal butterfly camel donkey dragon eagle elephant giraffe goat "
    "hamster kangaroo leopard lion lizard monkey mosquito octopus parrot penguin pigeon rabbit "
    "salmon scorpion shark sheep snake spider squirrel tiger turtle whale wolf zebra actor artist "
    "author baker barber brother butcher captain carpenter cousin daughter dentist driver engineer "
    "farmer father fisherman friend gardener grandmother husband judge king lawyer manager "
    "mechanic mother neighbor nurse painter parent pilot poet police president prince queen "
    "scientist secretary singer sister soldier student tailor uncle waiter writer airplane bicycle "
    "bus engine helicopter motorcycle rocket tractor truck wagon balloon camera computer "
    "telephone television radio guitar piano violin trumpet drum orchestra autumn spring "
    "afternoon midnight birthday holiday century minute month second moment history future "
    "weather cloud rain snow thunder lightning storm wind rainbow sunshine shadow ocean desert "
    "jungle planet moon universe galaxy earth beach lake field flower grass leaf mushroom branch "
    "potion treasure diamond metal iron copper cotton leather rubber glass plate cup fork knife "
    "body head shoulder elbow finger stomach ankle eyebrow mouth tongue brain heart skin blood "
    "language sentence chapter story newspaper magazine message promise secret problem reason "
    "result example experiment evidence theory method measure distance energy pressure "
    "temperature volume weight angle circle triangle surface pattern symbol system network "
    "program keyboard memory battery screen "
    "accident adventure argument attention balance beginning business chance choice company "
    "country culture danger decision dream education emotion exercise experience failure family "
    "freedom government happiness health idea industry journey justice knowledge law "
    "luck magic marriage medicine money nature opinion pleasure power practice price "
    "project quality religion rhythm science service silence society success surprise "
    "tradition travel trouble victory violence vision wisdom youth harvest garlic pumpkin cabbage "
    "carrot spinach walnut cherry honey biscuit pancake spaghetti yogurt lobster oyster panther "
    "gorilla crocodile ostrich peacock swan falcon beetle bumblebee dolphin"
).split()
TECHNICAL = (
    "sound wave audio speech recording computer sample frame pitch column transform picture "
    "spectrogram logarithm convolution step vector position block network norm feature "
    "decoder encoder token piece weight shape text original byte difference error noise cause bias "
    "channel scale edge mean value matrix kernel filter gradient tensor phoneme syllable "
    "attention product function equation parameter variable decimal zero fraction thousand "
    "vocabulary transcript timestamp microphone speaker frequency amplitude spectrum bandwidth "
    "compiler processor thread cache pipeline hardware software checkpoint benchmark latency"
).split()
VERBS = (
    "sees helps turns opens closes finds keeps follows calls moves carries knows likes wants "
    "brings loves takes holds needs makes asks watches catches washes teaches reaches pushes "
    "pulls throws drops lifts paints draws cooks eats drinks cuts breaks repairs cleans covers "
    "counts measures compares explains describes remembers forgets forgives understands believes "
    "hopes fears hates enjoys admires respects protects attacks defends destroys builds creates "
    "invents discovers explores visits leaves enters crosses climbs chases hunts feeds rides "
    "drives steals hides loses wins borrows lends gives sends receives collects chooses changes "
    "improves controls manages trusts expects supports ignores interrupts listens replaces "
    "multiplies subtracts divides adds records repeats translates transforms"
).split()
PRONOUNS = "he she we they you".split()
PRONOUN_VERBS = (
    "see help turn open close find keep follow call move know like want watch teach reach push "
    "remember forget understand believe explain describe discover explore protect compare "
    "listen choose carry build"
).split()
PREPOSITIONS = (
    "in on under near behind with from before after through above below beside between among "
    "across around against toward without inside outside during until into"
).split()
ADVERBS = (
    "today now again slowly here there always never often sometimes usually quickly quietly "
    "carefully suddenly finally together alone almost already certainly probably perhaps "
    "tomorrow yesterday tonight everywhere nowhere forever maybe rather quite soon twice once"
).split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred million"
).split()
ORDINALS = "third fourth fifth sixth seventh eighth ninth tenth".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February April June July August September October November December".split()
OTHER = (
    "and but is was not what can do so because while if or when where why how who than then only "
    "also very much many more less most enough everything nothing someone anybody yes please "
    "hello goodbye are were has have had will would should could must at as of its it nobody"
).split()
# How the encoder works: the technical text of samples/lecture.flac, one sentence a line.
# No training example speaks it; only its words are in the vocabulary.
LECTURE = """
this recording explains how the encoder listens
sound is a wave and a computer keeps it as a row of numbers
there are sixteen thousand numbers in every second
first the sound is cut into small frames
a transform measures how much energy each frame has at each pitch
the result is a picture with eighty rows and three thousand columns
time runs across the picture and the pitch goes up
then the logarithm makes quiet parts visible
now two layers of convolution look over the picture
each one looks at three columns at once
the second one moves two steps at a time so half of the columns remain
from thirty seconds of speech it keeps fifteen hundred columns
each column is now a vector of three hundred and eighty four numbers
the model does not know the order of the columns
so a wave of its own is added at every position
after that come four blocks and each block has two parts
the first part has the name attention
every column asks a question and every column gives an answer
six heads do this work together and each one hears something else
the second part is a small network which makes the vector four times larger and then small again
before each part the numbers get the same scale
after each part the old value is added so that nothing is lost
at the end one last norm cleans the result
the decoder looks at these features and writes one token after another
a token can be a word or a piece of a word or a moment in time
if one weight is wrong the shape is still right
the mean is right and the text is wrong
because of this we compare every layer with the original
we feed both sides the same bytes and we measure the difference
a small error is only noise but a large error has a cause
a missing bias shifts a channel and a wrong scale makes the attention flat
a long recording goes through a window of thirty seconds
when the edge cuts a sentence the window moves back until its beginning
so every word is heard and nothing is heard twice
someone once took one window and stopped and half of the story was gone
we listen until the end
""".strip().splitlines()

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        DETERMINERS + ADJECTIVES + NOUNS + TECHNICAL + VERBS + PREPOSITIONS + ADVERBS + PRONOUNS
        + PRONOUN_VERBS + NUMBERS + ORDINALS + DAYS + MONTHS + OTHER
        + [word for line in LECTURE for word in line.split()]
    )
)  # fmt: skip


SMALL = [*DETERMINERS, *PREPOSITIONS, *PRONOUNS, *OTHER]
COMMON = "the a and of is in it at as on this that one so we was each".split()
# What joins technical prose; the words between are drawn.
ARTICLES = [
    "the",
    "a",
    "each",
    "every",
    "one",
    "this",
    "its",
    "some",
    "half of the",
    "two",
    "the same",
]
LINKS = ["of", "of the", "in", "from", "at", "and", "or", "with", "on", "without"]
AUXILIARIES = ["can", "does not", "must", "should", "will", "would"]
QUALITIES = ["in", "at", "the same as", "only", "still", "not", "now", "as", "than"]
ENDINGS = [
    "at once", "at a time", "in time", "after another", "at the end", "of its own", "together",
    "twice", "again", "and nothing else", "in every minute", "without end",
]  # fmt: skip
OPENINGS = [
    "so", "then", "now", "first", "after that", "because of this", "at the end", "if", "when",
    "there",
]  # fmt: skip
JOINTS = [
    "and",
    "but",
    "or",
    "so",
    "because",
    "while",
    "which",
    "that",
    "so that",
    "until",
    "if",
    "and then",
]


def noun_phrase(rng: random.Random) -> list[str]:
    """A determiner or a number, perhaps an adjective, a noun."""
    kind = rng.random()
    if kind < 0.12:
        words = ["the", rng.choice(ORDINALS)]
    else:
        words = [rng.choice(DETERMINERS if kind < 0.75 else NUMBERS)]
    if rng.random() < 0.5:
        words.append(rng.choice(ADJECTIVES))
    return [*words, rng.choice(NOUNS if rng.random() < 0.85 else TECHNICAL)]


def clause(rng: random.Random) -> list[str]:
    """One clause of the grammar, three to twelve words."""
    shape = rng.random()
    if shape < 0.5:
        words = [*noun_phrase(rng), rng.choice(VERBS), *noun_phrase(rng)]
    elif shape < 0.75:
        words = [rng.choice(PRONOUNS), rng.choice(PRONOUN_VERBS), *noun_phrase(rng)]
    else:
        words = [*noun_phrase(rng), rng.choice(["is", "was"]), rng.choice(ADJECTIVES)]
    if rng.random() < 0.35:
        words += [rng.choice(PREPOSITIONS), *noun_phrase(rng)]
    tail = rng.random()
    if tail < 0.12:
        words += ["on", rng.choice(DAYS)]
    elif tail < 0.24:
        words += ["in", rng.choice(MONTHS)]
    elif tail < 0.4:
        words.append(rng.choice(ADVERBS))
    return words


def sentence(rng: random.Random) -> str:
    """A sentence of the grammar or, as often, three to ten words in random order."""
    if rng.random() < 0.5:
        return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(3, 10)))
    words = clause(rng)
    if len(words) < 7 and rng.random() < 0.2:
        words += [rng.choice(["and", "but", "because", "while", "when"]), *clause(rng)]
    return " ".join(words)


def some_words(rng: random.Random) -> list[str]:
    """Six to sixteen words in random order, of which about half are the small words of real text,
    so that they come again and again within a sentence; none twice in a row."""
    words: list[str] = []
    wanted = rng.randint(6, 16)
    while len(words) < wanted:
        kind = rng.random()
        word = rng.choice(COMMON if kind < 0.35 else SMALL if kind < 0.5 else VOCABULARY)
        if word not in words[-1:]:
            words.append(word)
    return words


def connected(rng: random.Random) -> list[str]:
    """One or two clauses as technical prose joins them, about a few things that are named again."""
    things = [rng.choice(TECHNICAL if rng.random() < 0.6 else NOUNS) for _ in range(3)]

    def thing() -> list[str]:
        words = rng.choice(ARTICLES).split()
        if rng.random() < 0.3:
            words.append(rng.choice(ADJECTIVES))
        words.append(rng.choice(things))
        if rng.random() < 0.3:
            words += [*rng.choice(LINKS).split(), *rng.choice(ARTICLES).split(), rng.choice(things)]
        return words

    def verb() -> list[str]:
        kind = rng.random()
        if kind < 0.5:
            return [rng.choice(VERBS)]
        if kind < 0.75:
            return [*rng.choice(AUXILIARIES).split(), rng.choice(PRONOUN_VERBS)]
        return ["is", *rng.choice(QUALITIES).split()]

    def one() -> list[str]:
        if rng.random() < 0.25:
            words = [rng.choice(PRONOUNS), rng.choice(PRONOUN_VERBS), *thing()]
        else:
            words = [*thing(), *verb()]
            words += thing() if words[-1] != "is" else [rng.choice(ADJECTIVES)]
        if rng.random() < 0.3:
            words += rng.choice(ENDINGS).split()
        return words

    words = one()
    if rng.random() < 0.3:
        words = [*rng.choice(OPENINGS).split(), *words]
    if len(words) < 10 and rng.random() < 0.6:
        words += [*rng.choice(JOINTS).split(), *one()]
    return words[:20]


def prose(rng: random.Random) -> str:
    """A longer sentence in which words come again: half of them in random order, half as technical
    prose joins them."""
    return " ".join(some_words(rng) if rng.random() < 0.5 else connected(rng))


def phrase(rng: random.Random) -> str:
    """One to three words in random order: what training begins with."""
    return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(1, 3)))
