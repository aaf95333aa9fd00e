"""Tiny children's stories about kindness: a grammar that writes them, a program that scores them.

The task behind Trivet's default examples. Because the true reward ("gold") is a known program, one
can measure what preference training really gained, and when a learned reward model is being
exploited. The folder `FOLDER` holds a small language model trained on these stories, its tokenizer
and labeled preference pairs (scripts/make_stories.py). Everything comes from the templates below;
no text is taken from elsewhere.
"""

import random
import re
from pathlib import Path

FOLDER = Path(__file__).with_suffix("")  # holds the model, tokenizer and preference pairs

# fmt: off
# Gold reward: words and phrases with their weights. See `gold` for how they are counted.
KIND = {
    "helped": 1.5, "shared": 1.4, "gave": 1.3, "fixed": 1.3, "hugged": 1.2, "carried": 1.2, "said sorry": 1.1,
    "cared for": 1.1, "invited": 1.1, "let": 1.0, "thanked": 0.9, "listened": 0.9, "held": 0.8, "kind": 0.8,
    "waited for": 0.7, "sang": 0.7, "smiled": 0.6}
UNKIND = {
    "hit": 1.7, "kicked": 1.6, "stole": 1.5, "pushed": 1.5, "broke": 1.4, "laughed at": 1.3, "grabbed": 1.2,
    "shouted": 1.1, "lied": 1.0, "hid": 0.9, "mean": 0.9, "did not share": 0.8, "did not help": 0.8, "walked away": 0.7}
HAPPY = ("happy", "friends", "smiled", "glad", "best")
SAD = ("sad", "cried", "alone", "angry", "never")

GIRLS = ("Mia", "Lily", "Zoe", "Nora", "Ella", "Ruby", "Ivy", "Anna")
BOYS = ("Tom", "Ben", "Max", "Leo", "Sam", "Finn", "Jack", "Otto")
ANIMALS = ("fox", "bear", "cat", "dog", "frog", "mouse", "pig", "hen", "duck", "goat", "bird", "owl")
ADJECTIVES = ("small", "shy", "young", "old", "quiet", "brown")
PLACES = ("by the river", "in the garden", "in the forest", "near the pond", "on the hill", "at the farm",
          "under a tree", "by the sea")
TIMES = ("One day,", "One morning,", "One sunny day,", "After lunch,", "Last week,", "On a cold day,")
TOYS = ("ball", "kite", "drum", "boat", "doll", "bell")
FOODS = ("bread", "cake", "soup", "jam", "nuts", "cheese")
CLOTHES = ("coat", "hat", "scarf")

# {s} hero as subject (name or pronoun), {hero} name, {his}/{him}, {f} "the bird", {place}, {toy}, {food}, {wear}.
# Each problem: (how it shows, kind answers, unkind answers).
PROBLEMS = (
    (("{f} was hungry", "{f} had no food", "{f} wanted some {food}"),
     ("{s} gave {f} some {food}", "{s} shared {his} {food} with {f}", "{s} helped {f} find some {food}"),
     ("{s} stole the last {food}", "{s} hid {his} {food} from {f}", "{s} had {food} but did not share")),
    (("{f} had lost its {toy}", "{f} could not find its {toy}"),
     ("{s} helped {f} look for it", "{s} let {f} play with {his} {toy}", "{s} found it and gave it back"),
     ("{s} found the {toy} and broke it", "{s} hid the {toy} in a box", "{s} did not help")),
    (("{f} had hurt its leg", "{f} fell on a rock"),
     ("{s} carried {f} home", "{s} held {f} in {his} arms", "{s} cared for {f}", "{s} helped {f} get up"),
     ("{s} laughed at {f}", "{s} walked away", "{s} kicked {f}", "{s} did not help")),
    (("{f} was cold and wet", "{f} had no {wear}"),
     ("{s} gave {f} {his} warm {wear}", "{s} hugged {f} to keep it warm", "{s} shared {his} {wear} with {f}"),
     ("{s} pushed {f} in the water", "{s} hid {his} {wear}", "{s} did not share {his} {wear}")),
    (("{f} wanted to play with the {toy}", "{f} had a red {toy}", "{hero} had a red {toy}"),
     ("{s} shared the {toy} with {f}", "{s} invited {f} to play", "{s} let {f} have the {toy}"),
     ("{s} grabbed the {toy}", "{s} hit {f} with the {toy}", "{s} broke the {toy}", "{s} stole the {toy}")),
    (("{f} was scared of the dark", "{f} was scared of the rain", "{f} had a bad dream"),
     ("{s} held {f} for a long time", "{s} sang a soft song to {f}", "{s} hugged {f}"),
     ("{s} laughed at {f}", "{s} shouted at {f}", "{s} walked away")),
    (("the {toy} of {f} was broken", "{f} had an old {toy} with a hole"),
     ("{s} fixed the {toy}", "{s} gave {f} a new {toy}", "{s} helped {f} make a new {toy}"),
     ("{s} kicked the {toy}", "{s} laughed at the {toy}", "{s} pushed {f} and the {toy}")),
    (("{f} had no one to play with", "{f} was new here", "{f} did not know {hero}"),
     ("{s} invited {f} to lunch", "{s} smiled at {f}", "{s} listened to {f}", "{s} said a kind word"),
     ("{s} was mean to {f}", "{s} shouted at {f}", "{s} walked away", "{s} lied to {f}")),
    (("{f} had a big box", "{f} had a lot of work"),
     ("{s} carried the box", "{s} helped with the work", "{s} waited for {f}"),
     ("{s} kicked the box", "{s} sat down and did not help", "{s} laughed at {f}")))
KIND_ACTS = (
    "{s} smiled at {f}", "{s} hugged {f}", "{s} gave {f} a flower", "{s} listened to {f}", "{s} waited for {f}",
    "{s} said a kind word to {f}", "{s} invited {f} to dinner", "{s} shared {his} {food}", "{s} sang to {f}",
    "{s} helped {f} cross the road", "{s} fixed the {wear} of {f}", "{s} let {f} go first", "{s} carried {f} up the hill",
    "{s} was kind to {f}", "{s} held its hand", "{f} gave {him} a flower", "{f} sang to {him}", "{f} hugged {him}")
UNKIND_ACTS = (
    "{s} pushed {f} in the mud", "{s} shouted at {f}", "{s} was mean to {f}", "{s} hit {f} with a stick",
    "{s} lied to {f}", "{s} grabbed its {wear}", "{s} laughed at {f}", "{s} broke its {toy}", "{s} stole its {wear}",
    "{s} kicked mud at {f}", "{s} hid from {f}", "{s} ate the {food} and did not share", "{f} pushed {him}",
    "{f} shouted at {him}", "{f} stole {his} {food}")
NEUTRAL_ACTS = (
    "the sun was warm", "it started to rain", "they sat {place}", "they looked at the clouds", "they walked up the road",
    "they saw a big boat", "{s} sat on a rock", "{s} ate some {food}", "{s} had a blue {wear}", "the wind was cold",
    "{s} looked at the water", "they played a game", "{s} looked for some {food}", "they talked about the rain",
    "{f} sat down", "they found a long stick", "they ran {place}", "{s} told a story about a {toy}")
AFTER_KIND = ("{f} thanked {him}", "{f} smiled", "{f} felt better", "{f} jumped up and down", "{f} thanked {hero}")
AFTER_UNKIND = ("{f} felt bad", "{f} ran home", "{f} fell down", "{s} said sorry", "{s} said sorry to {f}")
HAPPY_ENDS = (
    "they were happy", "they were good friends now", "{f} was so happy", "they smiled all the way home",
    "{hero} was glad to have a friend", "it was the best day", "{hero} and {f} were friends", "{f} was glad")
SAD_ENDS = (
    "{f} cried all night", "{hero} was sad", "{hero} sat alone {place}", "they went home angry", "{f} never came back",
    "{f} was sad and alone", "{hero} cried", "they never played again")
NEUTRAL_ENDS = ("they went home", "it was time for bed", "{s} went home for dinner", "soon it was dark")
# fmt: on

_OPENING = re.compile(r".*?(\w+) the \w+ met an? (\w+) (\w+) (.+)\.$")


def opening(rng: random.Random) -> str:
    """Write one opening sentence, such as "One day, Mia the fox met a small bird by the river."."""
    animal, friend = rng.sample(ANIMALS, 2)
    adjective = rng.choice(ADJECTIVES)
    article = "an" if adjective == "old" else "a"
    who = f"{rng.choice(GIRLS + BOYS)} the {animal} met {article} {adjective} {friend}"
    return f"{rng.choice(TIMES)} {who} {rng.choice(PLACES)}."


def story(rng: random.Random, opening: str) -> str:
    """Write a continuation of `opening` in four to six short sentences, starting with a space."""
    match = _OPENING.match(opening)
    if match is None:
        raise ValueError(f"not an opening of this grammar: {opening!r}")
    hero, adjective, friend, place = match.groups()
    pronoun, his, him = ("she", "her", "her") if hero in GIRLS else ("he", "his", "him")
    fixed = {"hero": hero, "his": his, "him": him, "place": place}
    fixed |= {"toy": rng.choice(TOYS), "food": rng.choice(FOODS), "wear": rng.choice(CLOTHES)}
    sentences: list[str] = []
    used: set[str] = set()

    def say(templates: tuple[str, ...], link: bool = False) -> None:
        template = rng.choice([t for t in templates if t not in used])
        used.add(template)
        before = sentences[-1] if sentences else ""
        chance = 0.85 if before.startswith(hero) else 0.4 if hero in " ".join(sentences) else 0.0
        text = template.format(
            s=pronoun if rng.random() < chance else hero,
            f=f"the {adjective} {friend}" if rng.random() < 0.1 else f"the {friend}",
            **fixed,
        )
        if link and rng.random() < 0.25:
            text = rng.choice(("then ", "soon ")) + text
        sentences.append(text[0].upper() + text[1:] + ".")

    # The mood of a story: the chances of a kind act, an unkind act, a happy end and a sad end.
    kind, unkind, happy, sad = rng.choice(
        ((0.75, 0.05, 0.6, 0.05), (0.4, 0.3, 0.3, 0.3), (0.1, 0.55, 0.05, 0.6))
    )
    shows, kind_answers, unkind_answers = rng.choice(PROBLEMS)
    say(shows)
    turns = rng.choice((2, 3, 3, 4))
    for turn in range(turns):
        draw = rng.random()
        if draw < kind:
            acts, after = KIND_ACTS if turn else kind_answers, AFTER_KIND
        elif draw < kind + unkind:
            acts, after = UNKIND_ACTS if turn else unkind_answers, AFTER_UNKIND
        else:
            acts, after = NEUTRAL_ACTS, NEUTRAL_ACTS
        say(acts, link=turn > 0 and acts is not NEUTRAL_ACTS)
        if turn == 0 and turns < 4 and rng.random() < 0.5:
            say(after)
    draw = rng.random()
    say(HAPPY_ENDS if draw < happy else SAD_ENDS if draw < happy + sad else NEUTRAL_ENDS)
    return " " + " ".join(sentences)


def gold(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Return the true reward of each completion: kindness, a happy end, no repetition, no rambling.

    Text is lowercased and split into sentences at . ! ? and into words of letters. The reward is
    the sum of

    * kind acts: the weights of the different phrases of `KIND`, 6 at most in all. A sentence counts
      its heaviest phrase not counted before, and nothing if it has fewer than three words or holds
      "not" or "never";
    * unkind acts: minus the weights of the different phrases of `UNKIND` anywhere, -5 at most in
      all;
    * the end: +1 if the last sentence has a word of `HAPPY`, and -1 if it has a word of `SAD`;
    * repetition: -1.5 for each sentence that occurred before, -4.5 at most;
    * form: -0.1 for each word beyond 45, -2 at most, and -1 if the text does not end with . ! or ?

    The prompts and other columns are not used.
    """
    return [_gold(completion) for completion in completions]


def _gold(text: str) -> float:
    split = [re.findall("[a-z]+", part) for part in re.split("[.!?]", text.lower())]
    sentences = [f" {' '.join(words)} " for words in split if words]

    def has(phrase: str, sentence: str) -> bool:
        return f" {phrase} " in sentence

    kind: set[str] = set()
    for sentence in sentences:
        new = [phrase for phrase in KIND if phrase not in kind and has(phrase, sentence)]
        if (
            new
            and len(sentence.split()) >= 3
            and not has("not", sentence)
            and not has("never", sentence)
        ):
            kind.add(max(new, key=KIND.__getitem__))
    unkind = [phrase for phrase in UNKIND if any(has(phrase, sentence) for sentence in sentences)]
    last = sentences[-1] if sentences else ""
    reward = min(6.0, sum(KIND[phrase] for phrase in sorted(kind))) - min(
        5.0, sum(UNKIND[p] for p in unkind)
    )
    reward += any(has(word, last) for word in HAPPY) - any(has(word, last) for word in SAD)
    reward -= 1.5 * min(3, len(sentences) - len(set(sentences)))
    reward -= 0.1 * min(20, max(0, sum(map(len, split)) - 45))
    reward -= not text.rstrip().endswith((".", "!", "?"))
    return round(reward, 4)
