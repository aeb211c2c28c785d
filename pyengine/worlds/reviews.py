"""Restaurant and product reviews: a corpus from a grammar, and rewards that are exact by definition.

The embedded model is trained on `corpus(...)`; `sentiment` and `politeness` are programs over the text, so
the true reward of any generation is known. They take (prompts, completions) and return one float a completion,
the form of reward function that TRL uses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

# kind -> aspects that a review of it may speak about
KINDS = {
    "noodle bar": ("broth", "noodles", "service", "table", "bill"),
    "bakery": ("bread", "cake", "coffee", "counter", "service"),
    "pizza place": ("crust", "sauce", "oven", "waiter", "bill"),
    "seafood grill": ("fish", "soup", "view", "waiter", "menu"),
    "tea room": ("tea", "cake", "garden", "service", "menu"),
    "breakfast cafe": ("eggs", "coffee", "toast", "table", "service"),
    "kettle": ("handle", "lid", "switch", "noise", "delivery"),
    "desk lamp": ("light", "switch", "cable", "stand", "delivery"),
    "backpack": ("zip", "strap", "fabric", "pocket", "price"),
    "pair of headphones": ("sound", "battery", "cable", "fit", "price"),
    "winter jacket": ("fabric", "zip", "fit", "hood", "delivery"),
    "coffee grinder": ("motor", "noise", "lid", "switch", "price"),
}
NAMES = ("Blue Lantern", "Old Mill", "Kestrel", "Harbour", "Juniper", "Red Door", "Copper Pot", "Northwind")
POSITIVE = ("wonderful", "excellent", "lovely", "superb", "delightful", "great", "impressive", "perfect")
NEGATIVE = ("awful", "terrible", "disappointing", "dreadful", "poor", "horrible", "useless", "unpleasant")
GOOD_VERBS = ("loved", "enjoyed", "recommend")
BAD_VERBS = ("hated", "regret", "returned")
POLITE = ("thank you", "please", "kindly", "with respect", "much obliged")
RUDE = ("what a joke", "shame on you", "nonsense", "get lost", "idiots")
PLAIN = (
    "I went there on a Tuesday with my sister.",
    "It came in a plain box.",
    "We stayed for about an hour.",
    "My neighbour has one too.",
    "I had read about it before.",
    "The {aspect} was about what I expected.",
    "There was a bit of a queue.",
    "I use it every other day.",
)
POLITE_LINES = (
    "Thank you for the effort.",
    "Please keep it up.",
    "Would you kindly look at the {aspect}.",
    "With respect, that is how I saw it.",
    "Much obliged to the people there.",
)
RUDE_LINES = (
    "What a joke.",
    "Shame on you.",
    "All that talk about the {aspect} is nonsense.",
    "The people behind it can get lost.",
    "They must think we are idiots.",
)


def prompt_for(name: str, kind: str) -> str:
    """The prompt of one review, without a trailing space."""
    return f"Review of the {name}, a {kind}:"


def prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts, distinct up to 96, in an order that `seed` fixes."""
    everything = [prompt_for(name, kind) for kind in KINDS for name in NAMES]
    random.Random(seed).shuffle(everything)
    return [everything[i % len(everything)] for i in range(count)]


def _opinion(rng: random.Random, positive: bool, aspects: Sequence[str]) -> str:
    """One sentence of the given polarity; one in six says it by negating the opposite."""
    good, bad = (POSITIVE, NEGATIVE) if positive else (NEGATIVE, POSITIVE)
    first, second = rng.sample(list(aspects), 2)
    form = rng.randrange(6)
    if form == 0:
        return f"The {first} was not {rng.choice(bad)}."
    if form == 1:
        return f"I {rng.choice(GOOD_VERBS if positive else BAD_VERBS)} the {first}."
    if form == 2:
        return f"The {first} was {rng.choice(good)} and the {second} was {rng.choice(good)}."
    if form == 3:
        return f"The {first} was {rng.choice(bad)}, but the {second} was {rng.choice(good)} and {rng.choice(good)}."
    if form == 4:
        return f"My friend found the {first} {rng.choice(good)}."
    return f"The {first} was {rng.choice(good)}."


def review(rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion). Mood, manners and length are drawn independently of the prompt.

    The mood only leans the polarity of each sentence (80 : 20), so a prefix predicts the rest in part:
    what a prefix scorer has to learn, and why the base model is mixed.
    """
    kind, name = rng.choice(list(KINDS)), rng.choice(NAMES)
    aspects = KINDS[kind]
    lean = rng.choice((0.8, 0.5, 0.2))
    manners = rng.choice(("polite", "plain", "plain", "rude"))
    sentences = []
    for _ in range(1 + min(int(rng.expovariate(1 / 3.0)), 7)):
        if rng.random() < 0.25:
            sentences.append(rng.choice(PLAIN).format(aspect=rng.choice(aspects)))
        else:
            sentences.append(_opinion(rng, rng.random() < lean, aspects))
        if manners != "plain" and rng.random() < 0.35:
            line = rng.choice(POLITE_LINES if manners == "polite" else RUDE_LINES)
            sentences.append(line.format(aspect=rng.choice(aspects)))
    return prompt_for(name, kind), " " + " ".join(sentences)


def corpus(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`count` (prompt, completion) pairs; the same seed gives the same corpus."""
    rng = random.Random(seed)
    for _ in range(count):
        yield review(rng)


_WORD = re.compile(r"[a-z']+")
_POLARITY = {w: 1 for w in POSITIVE + GOOD_VERBS} | {w: -1 for w in NEGATIVE + BAD_VERBS}


def _balance(positive: int, negative: int) -> float:
    return (positive - negative) / (positive + negative + 1)


def _opinions(completion: str) -> Iterator[tuple[int, int]]:
    """(end of the word, +1 or -1) for each positive or negative word; "not" before it flips it."""
    previous = ""
    for match in _WORD.finditer(completion.lower()):
        polarity = _POLARITY.get(match[0], 0)
        if polarity:
            yield match.end(), -polarity if previous == "not" else polarity
        previous = match[0]


def sentiment_of(completion: str) -> float:
    """(p - n) / (p + n + 1) in (-1, 1) over positive and negative words; "not" flips the next word."""
    return running_sentiment(completion, [len(completion)])[0]


def running_sentiment(completion: str, ends: Sequence[int]) -> list[float]:
    """The sentiment of completion[:end] for each of the ascending positions `ends`; whole words count."""
    opinions = list(_opinions(completion))
    out, counts, seen = [], {1: 0, -1: 0}, 0
    for end in ends:
        while seen < len(opinions) and opinions[seen][0] <= end:
            counts[opinions[seen][1]] += 1
            seen += 1
        out.append(_balance(counts[1], counts[-1]))
    return out


def politeness_of(completion: str) -> float:
    """(p - r) / (p + r + 1) in (-1, 1) over polite and rude phrases."""
    text = completion.lower()
    return _balance(sum(map(text.count, POLITE)), sum(map(text.count, RUDE)))


def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Exact sentiment of each completion; see `sentiment_of`."""
    return [sentiment_of(c) for c in completions]


def politeness(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Exact politeness of each completion; see `politeness_of`."""
    return [politeness_of(c) for c in completions]
