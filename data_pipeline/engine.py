"""Beam's options, and lines of text through Beam steps on whatever runner they name."""

import contextlib
import io
import re
from collections.abc import Iterable

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions, StreamingOptions

from data_pipeline import files
from subtractive_jax.errors import UserError

_LOCAL_RUNNERS = (None, "DirectRunner", "direct")


def parse_options(beam_options: list[str]) -> PipelineOptions:
    """Beam's options, which from then on hold for all access to files, too.

    Raises:
      UserError: a value that Beam does not take, or for a runner on this machine, an option that it does not know.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            options = PipelineOptions([f"--{option}" for option in beam_options])
            unknown = set(options.get_all_options(retain_unknown_options=True)) - set(options.get_all_options())
    except SystemExit as error:  # argparse's way
        raise UserError(f"--beam_pipeline_options: {said.getvalue().strip().splitlines()[-1]}") from error
    runner = options.view_as(StandardOptions).runner
    if runner in _LOCAL_RUNNERS and unknown:
        raise UserError(f"--beam_pipeline_options: Beam has no option {', '.join(sorted(unknown))}")
    if runner in _LOCAL_RUNNERS:
        # Or Beam would first try to download another runner, Prism, which ignores direct_num_workers.
        options.view_as(StreamingOptions).update_compatibility_version = beam.__version__
    FileSystems.set_options(options)
    return options


def run(steps: beam.PTransform, lines: Iterable[str], folder: str, beam_options: list[str]) -> list[str]:
    """Runs lines of text through Beam steps, by way of files, since a job's graph may not hold many of them."""
    given, taken = files.join(folder, "given.txt"), files.join(folder, "taken.txt")
    files.write_bytes(given, "".join(f"{line}\n" for line in lines).encode())
    options = parse_options(beam_options)
    try:
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:
        raise UserError(f"--beam_pipeline_options: {error}") from error
    try:
        with pipeline:
            out = pipeline | beam.io.ReadFromText(given) | beam.Reshuffle() | steps
            out | beam.io.WriteToText(taken, shard_name_template="", skip_if_empty=True)
    except Exception as error:  # what workers raise arrives as text
        if reason := re.search(r"UserError: (.+?)( \[while running .*)?$", str(error), re.MULTILINE):
            raise UserError(reason[1]) from error
        raise
    told = files.read_text(taken).splitlines() if files.exists(taken) else []
    files.delete([path for path in (given, taken) if files.exists(path)])
    return told
