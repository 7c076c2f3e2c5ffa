"""Documents into token numbers: bytes by default, or a Hugging Face `tokenizers` file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ds_plugin.core.errors import ConfigError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "[SEP]", "<eos>")


class Encoder(Protocol):
    """Turns UTF-8 documents into token arrays; `eod` is not appended. `name` tells encoders apart in a file name."""

    name: str
    fingerprint: str
    vocab_size: int
    eod: int
    dtype: type[np.number]

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...


class ByteEncoder:
    """Every byte is its own token (0-255), stored as uint8; NUL, which no accepted text holds, ends a document."""

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 256
    eod = 0
    dtype: type[np.number] = np.uint8

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """One uint8 array of shape [bytes] for each document."""
        return [np.frombuffer(document, dtype=np.uint8) for document in documents]


class FileEncoder:
    """A `tokenizers` JSON file. Adds no special tokens and ignores truncation or padding configured in the file.

    Raises ConfigError when the file is missing or unreadable, or names none of the tokens in END_OF_DOCUMENT.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(
                f"tokenizer: {str(path)!r} needs the package 'tokenizers'; pip install tokenizers, or leave the "
                f"setting out to train on bytes"
            ) from error
        if not path.is_file():
            raise ConfigError(
                f"tokenizer: the file {str(path)!r} does not exist; give a tokenizer.json, or leave it out"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ConfigError(
                f"tokenizer: {str(path)!r} is not a Hugging Face tokenizers file ({error}); save one with "
                f"Tokenizer.save, or leave the setting out to train on bytes"
            ) from error
        self._tokenizer.no_truncation()  # a limit meant for inference would silently cut documents
        self._tokenizer.no_padding()
        ends = [self._tokenizer.token_to_id(token) for token in END_OF_DOCUMENT]
        eod = next((number for number in ends if number is not None), None)
        if eod is None:
            raise ConfigError(
                f"tokenizer: {str(path)!r} has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT)} "
                f"to it with Tokenizer.add_special_tokens and save it"
            )
        from megatron.core.datasets.indexed_dataset import DType

        self.eod: int = eod
        # Numbers may have gaps, so the embedding's size is the largest number, not the count.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype: type[np.number] = DType.optimal_dtype(self.vocab_size)
        self.fingerprint = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self.name = path.stem

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """One array of `dtype`, shape [tokens], for each document."""
        encoded = self._tokenizer.encode_batch([d.decode("utf-8") for d in documents], add_special_tokens=False)
        return [np.array(one.ids, dtype=self.dtype) for one in encoded]


def load_encoder(tokenizer: Path | None) -> Encoder:
    """The byte encoder for None, else the one in the file."""
    return ByteEncoder() if tokenizer is None else FileEncoder(Path(tokenizer))
