"""Documents into token numbers: bytes by default, or a Hugging Face `tokenizers` file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ds_plugin.core.errors import ConfigError

END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "[SEP]", "<eos>")
LARGEST_VOCABULARY = 1 << 22
"""Token numbers from here on are a mistake: an embedding would have as many rows, whatever it is that uses them."""


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
    """A `tokenizers` JSON file, or the folder of one. Adds no special tokens and ignores truncation or padding
    configured in the file.

    The end of a document is the token named `eod`, the eos_token of a tokenizer_config.json beside the file, or the
    first of END_OF_DOCUMENT that there is.

    Raises ConfigError when the file is missing or unreadable, has no such token, or numbers beyond any vocabulary.
    """

    def __init__(self, path: Path, eod: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigError(
                f"tokenizer: {str(path)!r} needs the package 'tokenizers'; pip install tokenizers, or leave the "
                f"setting out to train on bytes"
            ) from error
        self._path = file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"tokenizer: the file {str(file)!r} does not exist; give a tokenizer.json or the folder of one (a fast "
                "tokenizer's save_pretrained writes it), or leave it out"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ConfigError(
                f"tokenizer: {str(file)!r} is not a Hugging Face tokenizers file ({error}); save one with "
                f"Tokenizer.save, or leave the setting out to train on bytes"
            ) from error
        self._tokenizer.no_truncation()  # a limit meant for inference would silently cut documents
        self._tokenizer.no_padding()
        self.eod: int = self._end_of_document(eod)
        # Numbers may have gaps, so the embedding's size is the largest number, not the count.
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = max(numbers) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ConfigError(
                f"tokenizer: {str(file)!r} numbers its {len(numbers)} tokens up to {max(numbers)}, and the embedding "
                f"would have a row for each number; give one whose numbers stay below {LARGEST_VOCABULARY}"
            )
        from megatron.core.datasets.indexed_dataset import DType

        self.dtype: type[np.number] = DType.optimal_dtype(self.vocab_size)
        self.fingerprint = hashlib.blake2b(file.read_bytes() + b"%d" % self.eod, digest_size=16).hexdigest()
        self.name = path.name if path.is_dir() else path.stem

    def _end_of_document(self, named: str | None) -> int:
        remedy = "name one of its tokens by --eod"
        if named is None and (named := _eos_token(self._path.with_name("tokenizer_config.json"))) is not None:
            remedy = f"which tokenizer_config.json names; {remedy}"
        for token in END_OF_DOCUMENT if named is None else (named,):
            if (number := self._tokenizer.token_to_id(token)) is not None:
                return int(number)
        if named is not None:
            raise ConfigError(f"tokenizer: {str(self._path)!r} has no token {named!r}, {remedy}")
        raise ConfigError(
            f"tokenizer: {str(self._path)!r} has no end-of-document token; {remedy}, or add one of "
            f"{', '.join(END_OF_DOCUMENT)} to it with Tokenizer.add_special_tokens and save it"
        )

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """One array of `dtype`, shape [tokens], for each document."""
        texts = [document.decode("utf-8") for document in documents]
        try:
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # plain Exception again, such as for a word where there is no unknown token
            raise ConfigError(
                f"tokenizer: {str(self._path)!r} cannot encode the text ({error}); give one that has a token for "
                "everything, such as bytes or an unknown token"
            ) from error
        return [np.array(one.ids, dtype=self.dtype) for one in encoded]


def load_encoder(tokenizer: Path | None, eod: str | None = None) -> Encoder:
    """The byte encoder for None, else the one in the file or folder; `eod` names its end-of-document token."""
    if tokenizer is not None:
        return FileEncoder(Path(tokenizer), eod)
    if eod is not None:
        raise ConfigError(f"eod: {eod!r} names a token, and there is no tokenizer; give --tokenizer, or leave it out")
    return ByteEncoder()


def _eos_token(path: Path) -> str | None:
    """The end-of-sequence token that a tokenizer_config.json names, if there is one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        token = config.get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"eos_token is {token!r}")
        return token
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"tokenizer: {str(path)!r} cannot be read ({error!r}); mend it, or give the tokenizer.json alone, "
            "in a folder of its own"
        ) from error
