"""Speech in, text out, from an artifact of Whisper or Moonshine. Needs no torch.

A sound that is longer than the model's window is cut into windows, one after the other, which are
transcribed by themselves: nothing is carried from one to the next, and a word on a border may be
lost. Cut at silence before, where that matters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_export.encoder_decoder.features import log_mel
from mmopt_export.encoder_decoder.seq2seq import Floats, Process, Seq2Seq
from mmopt_export.encoder_decoder.text import OnText, Opened, Stream
from mmopt_export.preprocessing import process_sounds
from mmopt_export.runtime import Runner, Tensors
from mmopt_kernels.errors import InputError

# Decoders and resamplers pass full scale by a few dB, never by 18; samples of 16 bits that were not
# scaled are quieter than that below -72 dB only.
_LOUDEST = 8.0


@dataclass(frozen=True)
class Segment:
    """A stretch of a sound: seconds from its start, and what was said.

    `end` is None where the model gave no end: it ran to the end of its window.
    """

    start: float
    end: float | None
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said in one sound.

    Attributes:
        text: all of it.
        language: the code of the language of the first window, such as `en`; None where the model
            knows one only.
        segments: with times, where they were asked for.
    """

    text: str
    language: str | None
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class _Window:
    sound: int
    start: float
    samples: Floats


class Transcriber(Opened):
    """An encoder-decoder artifact for speech; opened as `Opened` says."""

    def __init__(self, artifact: Path | Runner, *, threads: int | None = None) -> None:
        super().__init__(artifact, threads=threads)
        manifest = self.runner.manifest
        audio = manifest.preprocessing.get("audio")
        if audio is None:
            raise InputError(
                f"{manifest.name} reads texts, expected a model for speech. Open it with "
                "TextGenerator."
            )
        self.speech = Speech(self.graphs, self.settings, audio)
        self.sampling_rate: int = audio["sampling_rate"]

    def transcribe(
        self,
        sounds: Sequence[npt.NDArray[np.floating[Any]]],
        *,
        language: str | None = None,
        task: str | None = None,
        timestamps: bool = False,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
        batch_size: int = 8,
        on_text: OnText | None = None,
    ) -> list[Transcript]:
        """Transcribe sounds, or translate what is said in them.

        Args:
            sounds: samples `[n]` in [-1, 1] at `sampling_rate`, floats of one channel. Divide
                integers by their full scale, those of 16 bits by 32768.
            language: a code or a name, such as `de` or `german`; None lets the model find it.
            task: `transcribe`, or `translate` into English; None takes the model's settings.
            timestamps: whether to give segments with times.
            max_new_tokens: for each window.
            adapter: one of the artifact's, for all sounds; None runs the base alone.
            batch_size: windows that run at once.
            on_text: called as text comes; windows of one sound may come out of order.

        Raises:
            InputError: an empty sound, one of integers or far beyond [-1, 1], or a language, task,
                timestamps or adapter that the model lacks.
        """
        windows = self._windows(sounds)
        texts: list[list[str]] = [[] for _ in sounds]
        segments: list[list[Segment]] = [[] for _ in sounds]
        languages: list[str | None] = [None] * len(sounds)
        for start in range(0, len(windows), batch_size):
            chosen = windows[start : start + batch_size]
            stream = (
                Stream(self.tokenizer, [one.sound for one in chosen], on_text, self.speech.says)
                if on_text is not None
                else None
            )
            rows, found = self.speech.run(
                [one.samples for one in chosen],
                language=language,
                task=task,
                timestamps=timestamps,
                max_new_tokens=max_new_tokens,
                adapter=adapter,
                on_tokens=stream,
            )
            if stream is not None:
                stream.close()
            for window, tokens, spoken in zip(chosen, rows, found, strict=True):
                texts[window.sound].append(self._text(tokens))
                languages[window.sound] = languages[window.sound] or spoken
                if timestamps:
                    segments[window.sound] += self._segments(tokens, window.start)
        return [
            Transcript(_join(parts), spoken, tuple(times))
            for parts, spoken, times in zip(texts, languages, segments, strict=True)
        ]

    def _windows(self, sounds: Sequence[npt.NDArray[np.floating[Any]]]) -> list[_Window]:
        windows = []
        for index, sound in enumerate(sounds):
            given = np.asarray(sound)
            if given.dtype.kind != "f":
                raise InputError(
                    f"sound {index} has samples of {given.dtype}, expected floats in [-1, 1]. "
                    "Divide integers by their full scale, those of 16 bits by 32768."
                )
            samples = given.astype(np.float32, copy=False)
            if samples.ndim != 1 or not samples.size:
                raise InputError(
                    f"sound {index} has the shape {samples.shape}, expected samples [n] of one "
                    "channel."
                )
            if not np.isfinite(samples).all():
                raise InputError(f"sound {index} holds NaN or Inf, expected samples in [-1, 1].")
            if (peak := float(np.abs(samples).max())) > _LOUDEST:
                raise InputError(
                    f"sound {index} reaches {peak:g}, expected samples in [-1, 1]. Divide samples "
                    "that were integers by their full scale, those of 16 bits by 32768."
                )
            size = self.speech.window or len(samples)
            windows += [
                _Window(index, start / self.sampling_rate, samples[start : start + size])
                for start in range(0, len(samples), size)
            ]
        return windows

    def _text(self, tokens: Sequence[int]) -> str:
        said = [token for token in tokens if self.speech.says(token)]
        text: str = self.tokenizer.decode(said, skip_special_tokens=True)
        return text

    def _segments(self, tokens: Sequence[int], offset: float) -> list[Segment]:
        """The stretches between times: `<|0.00|> text <|1.20|> <|1.20|> text <|2.00|>`."""
        segments = []
        start, said = 0.0, list[int]()
        for token in tokens:
            time = self.speech.time(token)
            if time is None:
                said.append(token)
                continue
            if text := self._text(said):
                segments.append(Segment(offset + start, offset + time, text))
            start, said = time, []
        if text := self._text(said):
            segments.append(Segment(offset + start, None, text))
        return segments


class Speech:
    """From samples to tokens: the part of a `Transcriber` that needs no tokenizer.

    Args:
        graphs: ready to generate.
        settings: `manifest.preprocessing["generation"]`.
        audio: `manifest.preprocessing["audio"]`.
    """

    def __init__(self, graphs: Seq2Seq, settings: dict[str, Any], audio: dict[str, Any]) -> None:
        self.graphs = graphs
        self.start: int = settings["start"]
        self.prompts: dict[str, Any] | None = settings["speech"]
        self.audio = audio
        self.window: int | None = audio.get("window")

    def features(self, sounds: Sequence[Floats]) -> Tensors:
        """The encoder's inputs for windows."""
        return encoder_inputs(sounds, self.audio)

    def says(self, token: int) -> bool:
        """Whether a token is text and not a time."""
        return self.time(token) is None

    def time(self, token: int) -> float | None:
        """Seconds into the window, for a token that is a time."""
        first = self.prompts["first_time"] if self.prompts else None
        if self.prompts is None or first is None or token < first:
            return None
        return float((token - first) * self.prompts["time_step"])

    def run(
        self,
        sounds: Sequence[Floats],
        *,
        language: str | None = None,
        task: str | None = None,
        timestamps: bool = False,
        max_new_tokens: int | None = None,
        adapter: str | None = None,
        on_tokens: Any = None,
    ) -> tuple[list[list[int]], list[str | None]]:
        """New tokens of each window, and the code of its language.

        Raises:
            InputError: a language, task, timestamps or adapter that the model lacks.
        """
        encoded = self.graphs.encode(self.features(sounds), adapter=adapter)
        prompts = self.prompt(encoded, len(sounds), language, task, timestamps)
        tokens = self.graphs.generate(
            encoded,
            prompts,
            max_new_tokens=max_new_tokens,
            process=self._times(len(prompts[0])) if timestamps else None,
            on_tokens=on_tokens,
        )
        names = {value: code for code, value in (self.prompts or {}).get("languages", {}).items()}
        return tokens, [names.get(one[1]) if len(one) > 1 else None for one in prompts]

    def prompt(
        self,
        encoded: Tensors,
        batch: int,
        language: str | None,
        task: str | None,
        timestamps: bool,
    ) -> list[list[int]]:
        """What the decoder starts with, for each row: start, language, task, no timestamps.

        As transformers' `generate` does: without a language and a task the model's own settings
        decide, and a language that is not said is found by the model.
        """
        if self.prompts is None:
            if language is not None or task is not None or timestamps:
                raise InputError(
                    "this model takes no language, task or timestamps, expected none of them."
                )
            return [[self.start] for _ in range(batch)]
        known = self.prompts
        language = language if language is not None else known["language"]
        task = task if task is not None else known["task"]
        first: list[int | None] = [self.start]
        if language is None and task is None:
            first += known["forced"]
        rows: list[list[int | None]] = [list(first) for _ in range(batch)]
        if language is not None:
            spoken: list[int] | None = [self._language(language)] * batch
        elif known["languages"] and (len(first) == 1 or first[1] is None):
            spoken = self._spoken(encoded, batch)
        else:
            spoken = None
        for index, row in enumerate(rows):
            if spoken is not None:
                row[1:2] = [spoken[index]]
            if task is not None:
                row[2:] = [self._task(task)]
            elif language is not None and known["tasks"]:
                row[2:] = [known["tasks"]["transcribe"]]
            silent = known["no_timestamps"]
            if not timestamps and silent is not None and row[-1] != silent:
                row.append(silent)
            elif timestamps and row[-1] == silent:
                row.pop()
        if timestamps and known["first_time"] is None:
            raise InputError("this model has no timestamps, expected timestamps=False.")
        return [[token for token in row if token is not None] for row in rows]

    def _language(self, language: str) -> int:
        assert self.prompts is not None
        languages: dict[str, int] = self.prompts["languages"]
        code = language.lower().strip("<|>")
        code = self.prompts["language_names"].get(code, code)
        if code not in languages:
            raise InputError(
                f"language {language!r} is not one of this model's: "
                f"{', '.join(sorted(languages)) or 'it knows English only'}."
            )
        return languages[code]

    def _task(self, task: str) -> int:
        assert self.prompts is not None
        tasks: dict[str, int] = self.prompts["tasks"]
        if task not in tasks:
            raise InputError(
                f"task {task!r} is not one of this model's: {', '.join(sorted(tasks)) or 'none'}."
            )
        return tasks[task]

    def _spoken(self, encoded: Tensors, batch: int) -> list[int]:
        """The most likely language of each row, by what comes after the start."""
        assert self.prompts is not None
        ids = np.asarray(sorted(self.prompts["languages"].values()))
        logits = self.graphs.first(encoded, [[self.start]] * batch)
        return [int(one) for one in ids[logits[:, ids].argmax(axis=1)]]

    def _times(self, prompt: int) -> Process:
        assert self.prompts is not None
        return Times(
            first=self.prompts["first_time"],
            silent=self.prompts["no_timestamps"],
            eos=self.graphs.rules.eos[0],
            prompt=prompt,
            latest=self.prompts["latest_first_time"],
        )


def encoder_inputs(sounds: Sequence[Floats], audio: Mapping[str, Any]) -> Tensors:
    """What an encoder reads of sounds: samples, or where `audio` has `bins` log-mel features."""
    if "bins" in audio:
        return {"input_features": log_mel(sounds, audio)}
    return process_sounds(sounds, audio)


@dataclass(frozen=True)
class Times:
    """Whisper's rules for times: in pairs, never back, and first of all.

    Attributes:
        first: the id of the time 0; times are all ids from there on.
        silent: the id that says that there are no times.
        eos: the id that ends a row; text has smaller ids.
        prompt: tokens of the prompt.
        latest: the latest time that a row may begin with, in steps; None for any.

    Source: Radford et al. 2022, arXiv:2212.04356, section 4.5, and its decoding code.
    """

    first: int
    silent: int
    eos: int
    prompt: int
    latest: int | None

    def __call__(self, scores: Floats, rows: Sequence[Sequence[int]]) -> Floats:
        """Scores `[B, V]` without what may not come."""
        scores = scores.copy()
        scores[:, self.silent] = -np.inf
        for row, tokens in zip(scores, rows, strict=True):
            self._pair(row, tokens[self.prompt :])
        for row in scores:
            times, text = row[self.first :], row[: self.first]
            # More likely to be any time than the best text: then it is a time.
            if _log_sum(times) > text.max(initial=-np.inf):
                text[:] = -np.inf
        return scores

    def _pair(self, scores: Floats, tokens: Sequence[int]) -> None:
        times = [token for token in tokens if token >= self.first]
        ended = len(tokens) >= 1 and tokens[-1] >= self.first
        paired = len(tokens) < 2 or tokens[-2] >= self.first
        if ended and paired:
            scores[self.first :] = -np.inf
        elif ended:
            scores[: self.eos] = -np.inf
        if times:
            # A time that ends a stretch begins the next one; otherwise the next is later.
            again = ended and not paired
            scores[self.first : times[-1] + (0 if again else 1)] = -np.inf
        if not tokens:
            scores[: self.first] = -np.inf
            if self.latest is not None:
                scores[self.first + self.latest + 1 :] = -np.inf


def _log_sum(scores: Floats) -> float:
    """log of the sum of exp, -inf for nothing."""
    most = float(scores.max(initial=-np.inf))
    if most == -np.inf:
        return most
    return most + float(np.log(np.exp(scores.astype(np.float64) - most).sum()))


def _join(parts: Sequence[str]) -> str:
    """The texts of the windows, with one space between them."""
    return " ".join(part.strip() for part in parts if part.strip())
