"""The words that instructions are made of and checked by."""


def _words(text: str) -> frozenset[str]:
    return frozenset(" ".join(word.split()) for word in text.split(","))


VERBS = ("Add", "Add", "Add", "Generate", "Insert", "Put in", "Bring in", "Play", "Give me")

NOUNS = {
    "drums": ("drums", "drums", "beats", "percussion", "a drum track"),
    "bass": ("bass", "bass", "bass lines", "a bass part"),
    "guitar": ("guitar", "guitar", "guitars", "a guitar part"),
    "keys": ("keys", "keyboards", "a keyboard part"),
    "vocals": ("vocals", "singing"),
    "other": ("melodies", "an extra part"),
}
GENRES = {  # where a genre is called otherwise than its tag
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
AGGRESSIVE = ("metal", "punk", "rock")
EMOTIONAL = ("ballad", "soul", "gospel", "folk", "pop", "classical", "waltz")
DISTORTED = ("Distortion Guitar", "Overdriven Guitar")

DENSITY = {  # onsets a second: sparse below, busy above (quartiles of a thousand General MIDI songs)
    "drums": (3.3, 6.2),
    "bass": (1.4, 2.7),
    "guitar": (2.1, 6.5),
    "keys": (1.4, 3.7),
}
REGISTER = {"bass": (35, 39), "guitar": (55, 64), "keys": (59, 65)}  # median MIDI pitch: the same, low and high
LOUDNESS = {"drums": (61, 84), "bass": (81, 105), "guitar": (69, 91), "keys": (67, 91)}  # mean velocity: the same
TIMBRES = (  # what an instrument's General MIDI name says about its sound
    *(("Drum kit 24", "electronic"), ("Drum kit 25", "electronic"), ("Drum kit 32", "acoustic")),
    *(("Drum kit 40", "brushed"), ("Drum kit 48", "orchestral"), ("Drum kit", "acoustic")),
    *(("Acoustic Bass", "upright"), ("Fretless", "fretless"), ("Slap", "slap"), ("Picked", "picked")),
    *(("Synth", "synth"), ("Fingered", "fingered"), ("Nylon", "nylon-string"), ("Steel Guitar", "acoustic")),
    *(("Distortion", "distorted"), ("Overdriven", "overdriven"), ("Muted", "muted"), ("Clean", "clean")),
    *(("Jazz Guitar", "hollow-body"), ("Electric", "electric"), ("Acoustic", "acoustic")),
)
INSTRUMENTS = (  # General MIDI name to what people call it
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
PIECES = {  # drum pieces worth naming
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
FEELS = {
    "swing/triplet": ("a swing feel", "a shuffle feel"),
    "straight 8ths": ("straight eighth notes",),
    "straight 16ths": ("sixteenth notes", "a sixteenth-note groove"),
}
SOFT = ("pp", "p", "mp", "steady p", "steady mp", "soft", "quiet")  # what collections write as dynamics
LOUD = ("f", "ff", "steady f", "steady ff", "loud", "hard")
SPARSE, BUSY = ("sparse", "low", "minimal"), ("busy", "dense", "high")  # and as density
TOGETHER = {"bass+drums": ("a rhythm section",)}  # what several stems are called as one

# What a person's free list of aspects may say as a genre or a mood; a tag that says so itself needs no table.
GENRE_NAMES = _words("""
    afrobeat, ambient, americana, blues, bluegrass, bossa nova, breakbeat, britpop, chiptune, classical, country, dance,
    dancehall, disco, drum and bass, dub, dubstep, edm, electronic, electro, emo, fado, flamenco, folk, funk, fusion,
    garage rock, gospel, grunge, hard rock, heavy metal, hip hop, hip-hop, house, indie pop, indie rock, industrial,
    jazz, jungle, k-pop, latin, lo-fi, lofi, metal, neo soul, new age, new wave, opera, polka, pop, pop rock, post-rock,
    psychedelic rock, punk, punk rock, r&b, ragtime, rap, reggae, reggaeton, rock, rock and roll, rockabilly, salsa,
    samba, shoegaze, ska, smooth jazz, soul, surf rock, swing, synth-pop, synthwave, tango, techno, thrash metal,
    trance, trap, trip hop, waltz
""")
MOOD_NAMES = _words("""
    aggressive, angry, anthemic, atmospheric, bittersweet, bouncy, bright, brooding, calm, calming, carefree, catchy,
    cheerful, chill, chilled, cinematic, cool, dark, delicate, dramatic, dreamy, driving, eerie, emotional, energetic,
    epic, ethereal, euphoric, exciting, fierce, fun, funky, gentle, gloomy, groovy, happy, haunting, heartfelt, heavy,
    hopeful, hypnotic, inspiring, intense, intimate, joyful, laid-back, lively, lonely, lush, melancholic, mellow,
    moody, mysterious, nostalgic, ominous, optimistic, passionate, peaceful, playful, powerful, quirky, raw, rebellious,
    reflective, relaxed, relaxing, romantic, sad, sensual, sentimental, serene, smooth, solemn, soothing, soulful,
    spiritual, spooky, suspenseful, tender, tense, tranquil, triumphant, upbeat, uplifting, vibrant, warm, wistful
""")

# Words that name a stem, as people do. One word may name either of two stems.
STEM_WORDS = {
    "drums": _words("""
        drum, drums, drumming, drumbeat, drumbeats, beat, beats, backbeat, percussion, kit, snare, snares, hi-hat,
        hi-hats, hihats, cymbal, cymbals, tom, toms, congas, bongos, tambourine, shaker, cowbell, rimshots, bass
        drum, bass drums, drum-track, rhythm section
    """),
    "bass": _words("""
        bass, basses, bassline, basslines, bass-line, bass-lines, bass guitar, bass synth, sub-bass, synth bass,
        string bass, rhythm section
    """),
    "guitar": _words("""
        guitar, guitars, guitarist, banjo, ukulele, mandolin
    """),
    "keys": _words("""
        keys, keyboard, keyboards, piano, pianos, organ, rhodes, wurlitzer, clavinet, clav, harpsichord, accordion,
        synth, synths, synthesizer, synthesizers, vibraphone, marimba
    """),
    "vocals": _words("""
        vocal, vocals, voice, voices, singing, singer, singers, sung, rapping, rapper, raps, choir, crooning,
        vocalist, a cappella
    """),
    "other": _words("""
        melody, melodies, strings, violin, violins, viola, cello, cellos, orchestra, brass, horn, horns, trumpet,
        trumpets, trombone, sax, saxes, saxophone, saxophones, flute, flutes, clarinet, oboe, harmonica, fiddle,
        harp, synth, synths, synthesizer, synthesizers, pad, pads, choir, voices, effects, extra part, extra parts
    """),
}
# Words that a title shares with any instruction, so that they give no song away.
COMMON = _words("""
    a, add, all, an, and, as, at, be, but, by, can, come, demo, do, feat, feel, for, from, ft, generate, get, give, go,
    got, groove, had, has, have, he, her, here, him, his, i, if, in, insert, instrumental, into, is, it, its, just, let,
    live, make, me, mix, music, my, no, not, of, off, on, one, or, our, out, part, play, put, remix, she, so, some,
    song, sound, style, take, that, the, them, then, there, they, this, to, track, up, us, version, want, was, we, what,
    when, where, who, will, with, you, your
""")
# Function words of other languages written in Latin letters that English does not have.
FOREIGN = _words("""
    aber, auf, avec, con, dans, das, de, del, della, der, des, di, ein, eine, einen, el, en, et, fuer, hinzu, il, la,
    las, les, los, mit, och, oder, pour, por, para, sur, um, uma, un, una, und, une
""")
