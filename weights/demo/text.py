"""The language that `demo` knows: a closed vocabulary, a small grammar, and random word order.

Half of the sentences come from the grammar, half are words in random order, so that the decoder
has to listen and cannot guess. No two words sound alike (here/hear, for/four, red/read): in random
order nothing could tell them apart. Every function takes a `random.Random`: one seed, one corpus.
"""

from __future__ import annotations

import random

DETERMINERS = "the a this that every my your our".split()
ADJECTIVES = (
    "red blue green black white small big old new quiet loud fast slow cold warm bright dark "
    "young long short"
).split()
NOUNS = (
    "cat dog bird horse house garden river window door table book letter song voice word signal "
    "layer model number machine teacher doctor child city road train ship tree stone morning "
    "evening summer winter water fire music question answer"
).split()
VERBS = (
    "sees helps turns opens closes finds keeps follows calls moves carries knows likes wants "
    "brings loves takes holds needs makes"
).split()
PREPOSITIONS = "in on under near behind with from before after through".split()
ADVERBS = "today now again slowly here there always never".split()
PRONOUNS = "he she we they you".split()
PRONOUN_VERBS = "see help turn open close find keep follow call move know like want".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
OTHER = "and but is was not what country can do ask so".split()

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        DETERMINERS + ADJECTIVES + NOUNS + VERBS + PREPOSITIONS + ADVERBS
        + PRONOUNS + PRONOUN_VERBS + NUMBERS + DAYS + OTHER
    )
)  # fmt: skip


def noun_phrase(rng: random.Random) -> list[str]:
    """A determiner or a number, perhaps an adjective, a noun."""
    words = [rng.choice(DETERMINERS if rng.random() < 0.8 else NUMBERS)]
    if rng.random() < 0.5:
        words.append(rng.choice(ADJECTIVES))
    return [*words, rng.choice(NOUNS)]


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
    if tail < 0.15:
        words += ["on", rng.choice(DAYS)]
    elif tail < 0.35:
        words.append(rng.choice(ADVERBS))
    return words


def sentence(rng: random.Random) -> str:
    """A sentence of the grammar or, as often, three to ten words in random order."""
    if rng.random() < 0.5:
        return " ".join(clause(rng))
    return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(3, 10)))


def phrase(rng: random.Random) -> str:
    """One to three words in random order: what training begins with."""
    return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(1, 3)))
