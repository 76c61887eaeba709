"""What models work on: mel images of audio, or piano rolls of notes."""

from collections.abc import Mapping
from typing import Any

from subtractive_jax.errors import unknown_name
from subtractive_jax.representation.mel import Mel
from subtractive_jax.representation.piano_roll import PianoRoll


def from_config(representation: Mapping[str, Any]) -> Mel | PianoRoll:
    """The representation of `config.representation`.

    Raises:
      UserError: its name or a field is unknown, or fields contradict each other.
    """
    match representation["name"]:
        case "mel":
            return Mel.from_config(representation)
        case "piano_roll":
            return PianoRoll.from_config(representation)
    raise unknown_name("representation.name", str(representation["name"]), ("mel", "piano_roll"))
