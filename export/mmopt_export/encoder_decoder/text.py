"""Texts in, texts out: translation, summaries and the like, from an artifact. Needs no torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmopt_export.encoder_decoder.seq2seq import ENCODER, Seq2Seq, generation_settings
from mmopt_export.runtime import Runner
from mmopt_export.texts import require_texts
from mmopt_kernels.errors import InputError

OnText = Callable[[int, str], None]
"""Called with the number of an input and what was added to its text."""


class Opened:
    """An encoder-decoder artifact with its tokenizer, ready to generate.

    Args:
        artifact: a folder that `mmopt export` wrote, or an opened one.
        threads: intra-op threads; None takes every core that this process may use.

    Raises:
        InputError: the folder is not an artifact, or of another kind.
        CheckFailedError: its parity check had failed, or a file differs from the manifest.
        MmoptError: ONNX Runtime is missing or older than the artifact needs.
    """

    def __init__(self, artifact: Path | Runner, *, threads: int | None = None) -> None:
        self.runner = (
            artifact if isinstance(artifact, Runner) else Runner(artifact, threads=threads)
        )
        self.graphs = Seq2Seq.of(self.runner)
        self.settings = generation_settings(self.runner.manifest)
        self.tokenizer = _load_tokenizer(self.runner.path)


class TextGenerator(Opened):
    """An encoder-decoder artifact for text; opened as `Opened` says."""

    def __init__(self, artifact: Path | Runner, *, threads: int | None = None) -> None:
        super().__init__(artifact, threads=threads)
        manifest = self.runner.manifest
        if "audio" in manifest.preprocessing:
            raise InputError(
                f"{manifest.name} reads sounds, expected a model for text. Open it with "
                "Transcriber."
            )

    def generate(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        first: str | int | None = None,
        adapter: str | None = None,
        batch_size: int = 16,
        on_text: OnText | None = None,
    ) -> list[str]:
        """What the model says to each text, most likely token by token.

        Args:
            texts: of any lengths; longer ones than the model takes are cut.
            max_new_tokens: at most this many for each; None takes the model's settings.
            first: the token or the id that each answer begins with, such as mBART's language.
            adapter: one of the artifact's, for all texts; None runs the base alone.
            batch_size: texts that run at once; they are ordered by length.
            on_text: called as text comes.

        Raises:
            InputError: `texts` is a string, `first` is no token, there is no such adapter, or a
                setting is out of its range.
        """
        require_texts(texts)
        rules = self.graphs.rules
        if first is not None:
            rules = replace(rules, forced_bos=self._id(first))
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        answers = [""] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            feeds = self.runner.tokenize([texts[index] for index in chosen], ENCODER)
            stream = Stream(self.tokenizer, chosen, on_text) if on_text is not None else None
            rows = self.graphs.generate(
                self.graphs.encode(feeds, adapter=adapter),
                [[self.settings["start"]]] * len(chosen),
                max_new_tokens=max_new_tokens,
                rules=rules,
                on_tokens=stream,
            )
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = self.tokenizer.decode(row, skip_special_tokens=True)
            if stream is not None:
                stream.close()
        return answers

    def _id(self, token: str | int) -> int:
        found = token if isinstance(token, int) else self.tokenizer.token_to_id(token)
        if found is None or not 0 <= found < self.tokenizer.get_vocab_size():
            raise InputError(f"first={token!r} is no token of this model.")
        return int(found)


class Stream:
    """Turns tokens into text as they come: `on_tokens` of `Seq2Seq.generate`.

    Args:
        tokenizer: of the artifact.
        indices: the input that each row is of.
        on_text: where text goes.
        keep: which ids are written; None writes all but special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        indices: Sequence[int],
        on_text: OnText,
        keep: Callable[[int], bool] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._indices = indices
        self._on_text = on_text
        self._keep = keep
        self._tokens: list[list[int]] = [[] for _ in indices]
        self._said = [""] * len(indices)

    def __call__(self, fresh: dict[int, int]) -> None:
        """Take one token of each row that goes on."""
        for row, token in fresh.items():
            if self._keep is None or self._keep(token):
                self._tokens[row].append(token)
                self._say(row, last=False)

    def close(self) -> None:
        """Say what was held back."""
        for row in range(len(self._indices)):
            self._say(row, last=True)

    def _say(self, row: int, *, last: bool) -> None:
        text = self._tokenizer.decode(self._tokens[row], skip_special_tokens=True)
        # The bytes of one character may be several tokens; half of it decodes as U+FFFD.
        if not last and text.endswith("�"):
            return
        said = self._said[row]
        if text != said and text.startswith(said):
            self._on_text(self._indices[row], text[len(said) :])
            self._said[row] = text


def _load_tokenizer(artifact: Path) -> Any:
    """The artifact's tokenizer, of the `tokenizers` library.

    Raises:
        InputError: it has none.
    """
    from tokenizers import Tokenizer

    path = artifact / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{artifact} has no tokenizer.json. Export the model again.")
    return Tokenizer.from_file(str(path))
