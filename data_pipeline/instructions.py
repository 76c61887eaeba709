"""Captions of songs and instructions for stems, written from tags by templates.

Nothing here names a song. Which words a window gets depends on (song, window, stem) alone, so a rebuilt dataset says
the same. `every_instruction` lists all that the templates can say; the tests hold it against the paper's examples.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from data_pipeline import vocabulary

Tags = Mapping[str, Any]

_TEMPLATES = (
    "{verb} {noun}",
    "{verb} {genre} {noun}",
    "{verb} {genre} {noun}",
    "{verb} {genre} {noun} with {trait}",
    "{verb} {mood} {genre} {noun}",
    "{verb} {mood} {genre} {noun} with {trait}",
    "{verb} {mood} {noun}",
    "{verb} {mood} {timbre} {noun}",
    "{verb} {mood} {timbre} {noun} {purpose}",
    "{verb} {mood} {noun} {purpose}",
    "{verb} {timbre} {noun} with {trait}",
    "{verb} {noun} with {trait}",
    "{verb} {noun} with a {mood} {genre} flair",
    "{verb} {noun} with a {genre} feel",
    "{verb} {noun} in a {genre} style",
    "{verb} {mood} {genre} {noun} at {tempo} BPM",
    "I want {mood} {genre} {noun} here",
    "{verb} {noun} to make it sound {mood}",
    "{verb} {noun} for a {genre} song",
    "{verb} {register} {noun}",
    "{verb} {register} {genre} {noun}",
    "{verb} {mood} {noun} in a {register} register",
)
_PLAIN = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9&'/ -]{1,32}")
_NOT_A_STYLE = re.compile(r"guitar|piano|percussion|string|etude|drums")


def _stem_tags(tags: Tags, stem: str) -> Tags:
    return tags.get("stems", {}).get(stem, {})


def _named(table: Sequence[tuple[str, str]], instruments: Sequence[str]) -> list[str]:
    """For every instrument, the word of the first entry whose key its name holds."""
    words = (next((word for key, word in table if key in name), None) for name in instruments)
    return list(dict.fromkeys(word for word in words if word))


def _plain(word: object) -> str:
    """A tag's word as people write it, or nothing where it is not plain words: "Singer_Songwriter" and "R&B"."""
    words = str(word).replace("_", " ").split()
    text = " ".join(word if word.isupper() else word.lower() for word in words)
    return text if _PLAIN.fullmatch(text) else ""


def _plain_words(tags: Tags, key: str) -> list[str]:
    """The plain words of a tag that is a word or a list of words."""
    value = tags.get(key) or ()
    return [word for word in map(_plain, [value] if isinstance(value, str) else value) if word]


def _genre(tags: Tags) -> str:
    genre = _plain(tags.get("genre") or "")
    return genre.lower() if genre.lower() in vocabulary.GENRES else genre


def _genre_words(tags: Tags) -> list[str]:
    genre, style = _genre(tags), tags.get("style")
    words = list(vocabulary.GENRES.get(genre, (genre,))) if genre else []
    instruments = [name for stem in tags.get("stems", {}).values() for name in stem.get("instruments", ())]
    if genre in ("pop", "rock") and not set(instruments) & set(vocabulary.DISTORTED):
        words.append("indie")
    if style and style != genre and _PLAIN.fullmatch(style) and not _NOT_A_STYLE.search(style):
        words.append(style)
    return words


def _loudness(tags: Tags, stem: str) -> str:
    """`soft`, `loud` or `medium`: how hard the stem is played."""
    velocity = _stem_tags(tags, stem).get("vel_mean")
    quiet, hard = vocabulary.LOUDNESS.get(stem, (67, 91))
    dynamics = str(_stem_tags(tags, stem).get("dynamics") or tags.get("dynamics", ""))
    if (velocity is not None and velocity < quiet) or dynamics in vocabulary.SOFT:
        return "soft"
    return "loud" if (velocity is not None and velocity > hard) or dynamics in vocabulary.LOUD else "medium"


def _density(tags: Tags, stem: str) -> str:
    """`sparse`, `busy` or `medium`: as the stem's tags say, or else by its onsets."""
    described = _stem_tags(tags, stem)
    if "density" in described:
        density = described["density"]
        return "sparse" if density in vocabulary.SPARSE else "busy" if density in vocabulary.BUSY else "medium"
    onsets = described.get("onsets_per_s")
    sparse, busy = vocabulary.DENSITY.get(stem, (1.0, 4.0))
    if onsets is None:
        return "medium"
    return "sparse" if onsets < sparse else "busy" if onsets > busy else "medium"


def _register(tags: Tags, stem: str) -> list[str]:
    """`low` or `high`, where the stem's notes tell."""
    pitch = _stem_tags(tags, stem).get("pitch_median")
    if pitch is None or stem not in vocabulary.REGISTER:
        return []
    low, high = vocabulary.REGISTER[stem]
    return ["low"] if pitch < low else ["high"] if pitch > high else []


def _moods(tags: Tags, stem: str) -> list[str]:
    tempo, loudness = tags.get("tempo"), _loudness(tags, stem)
    moods = {"soft": ["soft", "gentle", "quiet"], "loud": ["loud", "powerful"], "medium": []}[loudness]
    if loudness == "loud" and _genre(tags) in vocabulary.AGGRESSIVE:
        moods += ["aggressive", "hard-hitting"]
    if tempo is not None and tempo < 85:
        moods += ["slow", "laid-back"]
    elif tempo is not None and tempo > 140:
        moods += ["fast", "driving"]
    moods += {"sparse": ["sparse", "simple"], "busy": ["busy", "energetic"], "medium": []}[_density(tags, stem)]
    if tempo is not None and tempo >= 105 and loudness != "soft":
        moods += ["lively", "upbeat"]
    return [*moods, *_plain_words(tags, "mood")] or ["steady"]


def _traits(tags: Tags, stem: str) -> list[str]:
    described = _stem_tags(tags, stem)
    traits = [name for piece in described.get("pieces", {}) for name in vocabulary.PIECES.get(piece, ())]
    traits += vocabulary.FEELS.get(tags.get("feel", ""), ())
    if stem == "drums" and _loudness(tags, stem) != "soft":
        traits += ["punchy beats", "a strong groove"]
    return traits


def _purposes(tags: Tags, stem: str) -> list[str]:
    purposes = ["to enhance emotion", "for a tender mood"] if _loudness(tags, stem) == "soft" else ["for more energy"]
    if _genre(tags) in vocabulary.EMOTIONAL:
        purposes.append("to lift the song")
    return purposes


def _slots(tags: Tags, stem: str) -> dict[str, list[str]]:
    """What each place of a template can hold; a template with an empty place is not used."""
    if "+" in stem:
        return _joint_slots(tags, stem)
    instruments = _stem_tags(tags, stem).get("instruments", ())
    nouns = list(vocabulary.NOUNS.get(stem, (stem.replace("_", " "),)))
    if stem in ("keys", "other"):
        nouns += _named(vocabulary.INSTRUMENTS, instruments)
    return {
        "verb": list(vocabulary.VERBS),
        "noun": nouns,
        "genre": _genre_words(tags),
        "mood": _moods(tags, stem),
        "timbre": _named(vocabulary.TIMBRES, instruments) + _plain_words(_stem_tags(tags, stem), "articulation"),
        "trait": _traits(tags, stem),
        "purpose": _purposes(tags, stem),
        "tempo": [f"{tags['tempo']:.0f}"] if tags.get("tempo") else [],
        "register": _register(tags, stem),
    }


def _joint_slots(tags: Tags, stem_name: str) -> dict[str, list[str]]:
    """For stems missing together: all are named, in either order, in the moods that fit all, with traits of any."""
    each = [_slots(tags, stem) for stem in stem_name.split("+")]
    bare = [list(dict.fromkeys(noun for noun in own["noun"] if not noun.startswith(("a ", "an ")))) for own in each]
    nouns = [_in_words(order) for names in itertools.product(*bare) for order in (names, names[::-1])]
    if any(own["timbre"] for own in each):
        names = tuple(" ".join([*own["timbre"][:1], nouns[0]]) for own, nouns in zip(each, bare, strict=True))
        nouns += [_in_words(names), _in_words(names[::-1])]

    def shared(place: str) -> list[str]:
        return [word for word in each[0][place] if all(word in own[place] for own in each)]

    return {
        "verb": each[0]["verb"],
        "noun": [*nouns, *vocabulary.TOGETHER.get(stem_name, ())],
        "genre": each[0]["genre"],
        "mood": shared("mood") or ["steady"],
        "timbre": [],
        "trait": list(dict.fromkeys(trait for own in each for trait in own["trait"])),
        "purpose": shared("purpose"),
        "tempo": each[0]["tempo"],
        "register": [],
    }


def _places(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _usable(slots: Mapping[str, list[str]]) -> list[str]:
    return [template for template in _TEMPLATES if all(slots[place] for place in _places(template))]


def _article_first(template: str, noun: str) -> str:
    """Nouns with an article take it in front of their adjectives: "a soft drum track"."""
    article, _, bare = noun.partition(" ")
    if article not in ("a", "an"):
        return template.replace("{noun}", noun)
    start = re.search(r"(\{(genre|mood|timbre|register)\} )*\{noun\}", template)
    assert start is not None
    head = template[: start.start()] + "a " + template[start.start() :]
    return head.replace("{noun}", bare)


def _with_articles(text: str) -> str:
    """`a` to `an` before a vowel that is heard as one."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU]|R&B)(?!one)", r"\1n ", text)


def _say(template: str, words: Mapping[str, str]) -> str:
    return _with_articles(_article_first(template, words["noun"]).format(**words))


def _pick(options: Sequence[str], *key: object) -> str:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def every_instruction(tags: Tags, stem: str) -> Iterator[str]:
    """All instructions that these tags allow for a stem."""
    slots = _slots(tags, stem)
    for template in _usable(slots):
        places = _places(template)
        for words in itertools.product(*(dict.fromkeys(slots[place]) for place in places)):
            yield _say(template, dict(zip(places, words, strict=True)))


def instructions(tags: Tags, stem: str, song_id: str, start_seconds: float, count: int) -> list[str]:
    """`count` instructions for one stem of one window, in the words of people rather than of tags.

    Args:
      tags: the song's tags; what is unknown is not mentioned.
      stem: a stem, or several missing together, such as `bass+drums`.
      start_seconds: of the window; with the song and the stem it decides the words.
    """
    slots = _slots(tags, stem)
    templates = _usable(slots)
    texts = []
    for index in range(count):
        key = (song_id, start_seconds, stem, index)
        template = _pick(templates, *key)
        words = {place: _pick(slots[place], *key, place) for place in _places(template)}
        texts.append(_say(template, words))
    return texts


def _in_words(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _players(tags: Tags) -> list[str]:
    """What is heard, stem by stem; keys and other by their instruments."""
    players: list[str] = []
    for stem, described in tags.get("stems", {}).items():
        own = _named(vocabulary.INSTRUMENTS, described.get("instruments", ())) if stem in ("keys", "other") else [stem]
        players += own[:2] or [stem]
    return list(dict.fromkeys("other instruments" if player == "other" else player for player in players))


_CAPTIONS = (
    "A {kind} song{players}{tempo}{key}",
    "A {kind} song{players}{tempo}{key}",
    "{kind} music{players}{tempo}",
    "A {kind} instrumental{players}{key}{tempo}",
)


def caption(tags: Tags, song_id: str, start_seconds: float) -> str:
    """What the full mix is: "A one-drop reggae song with drums, bass, guitar and organ, 74 BPM, in G major"."""
    style = tags.get("style")
    kind = style if style and _PLAIN.fullmatch(style) else _genre(tags)
    if kind == "latin":
        kind = "Latin"
    players = _players(tags)
    text = _pick(_CAPTIONS, song_id, start_seconds).format(
        kind=kind,
        players=f" with {_in_words(players)}" if players else "",
        tempo=f", {tags['tempo']:.0f} BPM" if tags.get("tempo") else "",
        key=f", in {tags['key']}" if tags.get("key") else "",
    )
    text = _with_articles(" ".join(text.split()))
    return text[0].upper() + text[1:]
