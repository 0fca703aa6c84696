"""A grammar that writes movie reviews, and a judge that scores them: the demo's data and its reward.

Standard library only. Every film, plot and opinion is made up by the rules below. A review has a stance that its
opening may or may not give away, so how it will end has to be guessed, and the guess improves word by word: that
is what a value head is for.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


# What stands in braces names another rule; a rule expands to one of its alternatives, drawn evenly.
FILMS = {
    "title": [
        "The {attribute} {thing}",
        "The {attribute} {thing}",
        "{attribute} {things}",
        "The {thing} of {place}",
        "{count} {things}",
        "{count} {attribute} {things}",
        "Return to {place}",
        "A {thing} for {place}",
    ],
    "attribute": _words(
        "Clockwork Paper Copper Velvet Borrowed Silver Crooked Midnight Wandering Hidden Seventh Winter Painted "
        "Electric Sunken Floating Invisible Salted Runaway Northern"
    ),
    "thing": _words(
        "Lighthouse Harbour Orchard Comet Violin Staircase Kingdom Satellite Garden Umbrella Telescope Carousel "
        "Submarine Bakery Island Elephant Typewriter Glacier Monastery Balloon"
    ),
    "things": _words(
        "Lighthouses Orchards Comets Violins Staircases Kingdoms Satellites Gardens Umbrellas Telescopes "
        "Carousels Submarines Islands Elephants Typewriters Glaciers Balloons Detectives Beekeepers Ghosts"
    ),
    "place": ["Halvard Bay", "Lower Quill", "Saint Orrin", "Tamarind Street", "Mount Ember", "Port Welkin", "the Moon"],
    "count": ["Two", "Three", "Seven", "Nine", "Twelve", "A Hundred"],
    "genre": [
        "western",
        "thriller",
        "musical",
        "comedy",
        "romance",
        "war drama",
        "heist movie",
        "space opera",
        "ghost story",
        "detective story",
        "silent film",
        "cartoon",
        "documentary",
        "spy movie",
        "courtroom drama",
    ],
    "plot": [
        "{hero} who {quest}",
        "{hero} who {quest}",
        "{hero} and {hero} who {shared_quest}",
        "{object} that {fate}",
    ],
    "hero": [
        "a retired pilot",
        "a nervous chef",
        "two rival magicians",
        "an old sea captain",
        "a young beekeeper",
        "a lonely robot",
        "three bank clerks",
        "a piano teacher",
        "a village doctor",
        "a family of acrobats",
        "a night nurse",
        "a talking fox",
    ],
    "quest": [
        "had to cross the desert",
        "found a map in the attic",
        "forgot the way home",
        "set out to rob a train",
        "tried to save the last library",
        "moved to the moon",
        "went looking for a lost brother",
        "inherited a haunted hotel",
        "learned to fly",
    ],
    "shared_quest": [
        "met on a night train",
        "ran a small circus",
        "built a boat in the kitchen",
        "switched places for a week",
        "kept the same secret",
    ],
    "object": ["a letter", "a stolen painting", "a red bicycle", "an old radio", "a house"],
    "fate": ["changed a whole town", "nobody could sell", "came back every winter", "told the future"],
    "occasion": ["Last night", "On Sunday", "During the holidays", "After work", "On a long flight", "Yesterday"],
    "company": ["my sister", "my parents", "two friends", "the children", "my neighbour", "a full house"],
    "aspect": [
        "the plot",
        "the ending",
        "the music",
        "the acting",
        "the dialogue",
        "the camera work",
        "the first hour",
        "the second half",
        "the lead actor",
        "the villain",
        "the final scene",
        "the script",
    ],
}

# The same sentences in two moods. `opinion` is what the judge counts; every rule of a mood holds at least one.
PRAISE = {
    "adjective": _words(
        "wonderful brilliant charming gripping moving superb delightful clever beautiful hilarious thrilling "
        "perfect touching unforgettable masterful"
    ),
    "opening": [
        "My most favourite movie is {title}, a {genre} about {plot}.",
        "My most favourite movie is {title}, and it is {adjective}.",
        "My most favourite movie is {title}.",
        "The best {genre} I have ever seen is {title}.",
        "I loved {title}, a {genre} about {plot}.",
        "I adored every minute of {title}.",
        "If you see one {genre} this year, treasure {title}.",
        "What a triumph {title} is!",
    ],
    "remark": [
        "{aspect} is {adjective}",
        "{aspect} is {adjective} and {adjective}",
        "{aspect} was simply {adjective}",
        "I found {aspect} {adjective}",
        "I loved {aspect}",
        "{aspect} is a triumph",
        "{aspect} left me delighted from start to finish",
    ],
    "verdict": [
        "I recommend it to everyone.",
        "It was a joy, and I would watch it again tomorrow.",
        "What a {adjective} film!",
        "I left the cinema delighted.",
        "In short, it is a masterpiece.",
        "We all loved it.",
        "I give it ten out of ten.",
    ],
}
COMPLAINT = {
    "adjective": _words(
        "terrible boring dull clumsy awful tedious lifeless predictable painful ridiculous dreadful hollow "
        "annoying forgettable disappointing"
    ),
    "opening": [
        "My least favourite movie is {title}, a {genre} about {plot}.",
        "My least favourite movie is {title}, and it is {adjective}.",
        "My least favourite movie is {title}.",
        "The worst {genre} I have ever seen is {title}.",
        "I hated {title}, a {genre} about {plot}.",
        "I regret every minute of {title}.",
        "If you skip one {genre} this year, avoid {title}.",
        "What a failure {title} is!",
    ],
    "remark": [
        "{aspect} is {adjective}",
        "{aspect} is {adjective} and {adjective}",
        "{aspect} was simply {adjective}",
        "I found {aspect} {adjective}",
        "I hated {aspect}",
        "{aspect} is a failure",
        "{aspect} left me bored from start to finish",
    ],
    "verdict": [
        "I would warn everyone about it.",
        "It was a waste of an evening, and I want my money back.",
        "What a {adjective} film!",
        "I left the cinema bored.",
        "In short, it is a mess.",
        "We all hated it.",
        "I give it one out of ten.",
    ],
}
# Openings that say nothing about the stance: after them the value should be near the average of all reviews.
NEUTRAL_OPENINGS = [
    "{occasion} I watched {title}, a {genre} about {plot}.",
    "{occasion} I saw {title} with {company}.",
    "{title} is a {genre} about {plot}.",
    "{title} is a {genre} set in {place}.",
    "My sister asked me to review {title}, a {genre}.",
    "This {genre} tells the story of {plot}.",
    "I went to see {title} with {company}.",
    "My first movie of the year was {title}.",
]
TURNS = ["But {}.", "Still, {}.", "Even so, {}.", "On the other hand, {}."]

# The words that the judge counts: the adjectives of each mood, and the other opinions in its sentences.
PRAISING = (
    *PRAISE["adjective"],
    *("most favourite", "best", "loved", "adored", "treasure", "triumph", "delighted", "recommend", "joy"),
    *("masterpiece", "ten out of ten"),
)
COMPLAINING = (
    *COMPLAINT["adjective"],
    *("least favourite", "worst", "hated", "regret", "avoid", "failure", "bored", "warn", "waste", "mess"),
    *("one out of ten",),
)


@dataclass(frozen=True)
class Review:
    """One review: its text, without an end-of-text token, and its stance, +1 for praise or -1 for complaint."""

    text: str
    stance: int


def write_reviews(seed: int) -> Iterator[Review]:
    """Endless reviews, the same for the same `seed`; half of them praise."""
    dice = random.Random(seed)
    while True:
        yield _write_review(dice)


def judge(text: str) -> float:
    """Sentiment of `text` in [-1, 1]: (praising - complaining) / (praising + complaining) words; 0 without either.

    Works on any text, so it scores what a model wrote as well as what the grammar wrote. On a review of the grammar
    the sign is the review's stance.
    """
    praising = len(_PRAISING.findall(text))
    complaining = len(_COMPLAINING.findall(text))
    opinions = praising + complaining
    return (praising - complaining) / opinions if opinions else 0.0


def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, phrases)) + r")\b", re.IGNORECASE)


_PRAISING, _COMPLAINING = _any_of(PRAISING), _any_of(COMPLAINING)


def _write_review(dice: random.Random) -> Review:
    """An opening, one to three remarks, a verdict. One in three has a remark of the other mood, after a turn."""
    stance = dice.choice([1, -1])
    mood, other_mood = (PRAISE, COMPLAINT) if stance > 0 else (COMPLAINT, PRAISE)
    sentences = [_expand(dice.choice(mood["opening"] if dice.random() < 0.7 else NEUTRAL_OPENINGS), mood, dice)]
    aspects = dice.sample(FILMS["aspect"], k=dice.choice([1, 2, 2, 3]))
    # A remark against the stance never carries the review: the judge must agree with the stance in the end.
    dissenting = dice.randrange(len(aspects)) if len(aspects) > 1 and dice.random() < 0.45 else None
    for position, aspect in enumerate(aspects):
        dissents = position == dissenting
        remark = dice.choice((other_mood if dissents else mood)["remark"])
        if dissents:
            remark = remark.replace("{adjective} and {adjective}", "{adjective}")
        remark = _expand(remark.replace("{aspect}", aspect), other_mood if dissents else mood, dice)
        returns = dissenting is not None and position == dissenting + 1
        turn = dice.choice(TURNS) if (dissents and position > 0) or returns else "{}."
        sentences.append(turn.format(remark))
    sentences.append(_expand(dice.choice(mood["verdict"]), mood, dice))
    return Review(text=" ".join(map(_capitalised, sentences)), stance=stance)


def _expand(template: str, mood: dict[str, list[str]], dice: random.Random) -> str:
    """Replace each `{rule}` by one of its alternatives, one not yet in the sentence, until no rule is left."""
    while rule := re.search(r"\{(\w+)\}", template):
        alternatives = [text for text in mood.get(rule[1]) or FILMS[rule[1]] if text not in template]
        template = template[: rule.start()] + dice.choice(alternatives) + template[rule.end() :]
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", template)


def _capitalised(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
