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
)
_VERBS = ("Add", "Add", "Add", "Generate", "Insert", "Put in", "Bring in", "Play", "Give me")

_NOUNS = {
    "drums": ("drums", "drums", "beats", "percussion", "a drum track"),
    "bass": ("bass", "bass", "bass lines", "a bass part"),
    "guitar": ("guitar", "guitar", "guitars", "a guitar part"),
    "keys": ("keys", "keyboards", "a keyboard part"),
    "vocals": ("vocals", "singing"),
    "other": ("melodies", "an extra part"),
}
_GENRES = {  # where a genre is called otherwise than its tag
    "blues": ("blues", "bluesy"),
    "electronic": ("electronic", "electro"),
    "folk": ("folk", "folky"),
    "funk": ("funk", "funky"),
    "jazz": ("jazz", "jazzy"),
    "latin": ("Latin",),
    "metal": ("metal", "heavy metal"),
    "r&b": ("R&B",),
    "show": ("show tune", "Broadway"),
    "soul": ("soul", "soulful"),
}
_AGGRESSIVE = ("metal", "punk", "rock")
_EMOTIONAL = ("ballad", "soul", "gospel", "folk", "pop", "classical", "waltz")
_DISTORTED = ("Distortion Guitar", "Overdriven Guitar")

_DENSITY = {  # onsets a second: sparse below, busy above (quartiles of a thousand General MIDI songs)
    "drums": (3.3, 6.2),
    "bass": (1.4, 2.7),
    "guitar": (2.1, 6.5),
    "keys": (1.4, 3.7),
}
_LOUDNESS = {"drums": (61, 84), "bass": (81, 105), "guitar": (69, 91), "keys": (67, 91)}  # mean velocity: the same
_TIMBRES = (  # what an instrument's General MIDI name says about its sound
    *(("Drum kit 24", "electronic"), ("Drum kit 25", "electronic"), ("Drum kit 32", "acoustic")),
    *(("Drum kit 40", "brushed"), ("Drum kit 48", "orchestral"), ("Drum kit", "acoustic")),
    *(("Acoustic Bass", "upright"), ("Fretless", "fretless"), ("Slap", "slap"), ("Picked", "picked")),
    *(("Synth", "synth"), ("Fingered", "fingered"), ("Nylon", "nylon-string"), ("Steel Guitar", "acoustic")),
    *(("Distortion", "distorted"), ("Overdriven", "overdriven"), ("Muted", "muted"), ("Clean", "clean")),
    *(("Jazz Guitar", "hollow-body"), ("Electric", "electric"), ("Acoustic", "acoustic")),
)
_INSTRUMENTS = (  # General MIDI name to what people call it
    *(("Electric Piano", "electric piano"), ("Piano", "piano"), ("Organ", "organ"), ("Accordion", "accordion")),
    *(
        ("Sax", "saxophone"),
        ("Trumpet", "trumpet"),
        ("Trombone", "trombone"),
        ("Brass", "brass"),
        ("String", "strings"),
    ),
    *(("Choir", "choir"), ("Voice", "voices"), ("Pad", "synth pad"), ("Lead", "synth lead"), ("FX", "synth effects")),
)
_PIECES = {  # drum pieces worth naming
    "crash": ("cymbal crashes", "crash cymbals"),
    "ride": ("a ride cymbal", "a steady ride"),
    "closed hat": ("crisp hi-hats", "tight hi-hats"),
    "open hat": ("open hi-hats",),
    "sidestick": ("rimshots", "a cross-stick"),
    "snare": ("a snare backbeat",),
    "kick": ("a solid kick",),
    "tom": ("tom fills",),
    "clap": ("hand claps",),
    "conga": ("congas",),
    "bongo": ("bongos",),
    "tambourine": ("a tambourine",),
    "cowbell": ("a cowbell",),
    "maracas": ("maracas",),
    "claves": ("claves",),
    "shaker": ("a shaker",),
}
_FEELS = {
    "swing/triplet": ("a swing feel", "a shuffle feel"),
    "straight 8ths": ("straight eighth notes",),
    "straight 16ths": ("sixteenth notes", "a sixteenth-note groove"),
}
_PLAIN_STYLE = re.compile(r"[A-Za-z0-9&'/ -]{1,32}")
_NOT_A_STYLE = re.compile(r"guitar|piano|percussion|string|etude|drums")


def _stem_tags(tags: Tags, stem: str) -> Tags:
    return tags.get("stems", {}).get(stem, {})


def _named(table: Sequence[tuple[str, str]], instruments: Sequence[str]) -> list[str]:
    """For every instrument, the word of the first entry whose key its name holds."""
    words = (next((word for key, word in table if key in name), None) for name in instruments)
    return list(dict.fromkeys(word for word in words if word))


def _genre_words(tags: Tags) -> list[str]:
    genre, style = tags.get("genre"), tags.get("style")
    words = list(_GENRES.get(genre, (genre,))) if genre else []
    instruments = [name for stem in tags.get("stems", {}).values() for name in stem.get("instruments", ())]
    if genre in ("pop", "rock") and not set(instruments) & set(_DISTORTED):
        words.append("indie")
    if style and style != genre and _PLAIN_STYLE.fullmatch(style) and not _NOT_A_STYLE.search(style):
        words.append(style)
    return words


def _loudness(tags: Tags, stem: str) -> str:
    """`soft`, `loud` or `medium`: how hard the stem is played."""
    velocity = _stem_tags(tags, stem).get("vel_mean")
    quiet, hard = _LOUDNESS.get(stem, (67, 91))
    dynamics = str(tags.get("dynamics", ""))
    if (velocity is not None and velocity < quiet) or dynamics in ("steady p", "steady mp"):
        return "soft"
    return "loud" if (velocity is not None and velocity > hard) or dynamics in ("steady f", "steady ff") else "medium"


def _moods(tags: Tags, stem: str) -> list[str]:
    tempo, onsets = tags.get("tempo"), _stem_tags(tags, stem).get("onsets_per_s")
    loudness = _loudness(tags, stem)
    sparse, busy = _DENSITY.get(stem, (1.0, 4.0))
    moods = {"soft": ["soft", "gentle", "quiet"], "loud": ["loud", "powerful"], "medium": []}[loudness]
    if loudness == "loud" and tags.get("genre") in _AGGRESSIVE:
        moods += ["aggressive", "hard-hitting"]
    if tempo is not None and tempo < 85:
        moods += ["slow", "laid-back"]
    elif tempo is not None and tempo > 140:
        moods += ["fast", "driving"]
    if onsets is not None and onsets < sparse:
        moods += ["sparse", "simple"]
    elif onsets is not None and onsets > busy:
        moods += ["busy", "energetic"]
    if tempo is not None and tempo >= 105 and loudness != "soft":
        moods += ["lively", "upbeat"]
    return moods or ["steady"]


def _traits(tags: Tags, stem: str) -> list[str]:
    described = _stem_tags(tags, stem)
    traits = [name for piece in described.get("pieces", {}) for name in _PIECES.get(piece, ())]
    traits += _FEELS.get(tags.get("feel", ""), ())
    if stem == "drums" and _loudness(tags, stem) != "soft":
        traits += ["punchy beats", "a strong groove"]
    return traits


def _purposes(tags: Tags, stem: str) -> list[str]:
    purposes = ["to enhance emotion", "for a tender mood"] if _loudness(tags, stem) == "soft" else ["for more energy"]
    if tags.get("genre") in _EMOTIONAL:
        purposes.append("to lift the song")
    return purposes


def _slots(tags: Tags, stem: str) -> dict[str, list[str]]:
    """What each place of a template can hold; a template with an empty place is not used."""
    instruments = _stem_tags(tags, stem).get("instruments", ())
    nouns = list(_NOUNS.get(stem, (stem,)))
    if stem in ("keys", "other"):
        nouns += _named(_INSTRUMENTS, instruments)
    return {
        "verb": list(_VERBS),
        "noun": nouns,
        "genre": _genre_words(tags),
        "mood": _moods(tags, stem),
        "timbre": _named(_TIMBRES, instruments),
        "trait": _traits(tags, stem),
        "purpose": _purposes(tags, stem),
        "tempo": [f"{tags['tempo']:.0f}"] if tags.get("tempo") else [],
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
    start = re.search(r"(\{(genre|mood|timbre)\} )*\{noun\}", template)
    assert start is not None
    head = template[: start.start()] + "a " + template[start.start() :]
    return head.replace("{noun}", bare)


def _with_articles(text: str) -> str:
    """`a` to `an` before a vowel that is heard as one."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!one)", r"\1n ", text)


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
        own = _named(_INSTRUMENTS, described.get("instruments", ())) if stem in ("keys", "other") else [stem]
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
    style, genre = tags.get("style"), tags.get("genre")
    kind = style if style and _PLAIN_STYLE.fullmatch(style) else genre or ""
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
