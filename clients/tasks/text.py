"""Predicting the next character of a text, with the speakers of a play as natural clients."""
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedcore.clients.data import Samples
from fedcore.clients.models import build_model, check_model
from fedcore.clients.partitions import Traits
from fedcore.clients.tasks.classification import Classification
from fedcore.clients.tasks.files import UnreadableData, existing, read_text
from fedcore.errors import InvalidSetting

ADVICE = (
    "Give any text file; speakers are recognised by lines such as 'ROMEO:' before what they say. Karpathy's "
    "tiny Shakespeare (char-rnn, data/tinyshakespeare/input.txt) is such a file."
)
# One vocabulary for everybody, whatever characters a client's own text happens to hold: a new line, printable ASCII,
# and one token for the rest.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
NUM_TOKENS = len(VOCABULARY) + 1
# The token of each character code up to the first code beyond printable ASCII, which stands for all further ones.
TOKENS = np.full(128, len(VOCABULARY), dtype=np.uint8)
TOKENS[[ord(character) for character in VOCABULARY]] = np.arange(len(VOCABULARY))
SPEAKER = re.compile(r"(?:^|\n\n)([A-Z][^\n:]{0,60}):\n")
TEST_SHARE = 0.1


class Shakespeare(Classification):
    """Next-character prediction on a local text.

    What each speaker says is put together, in the order in which speakers first appear, and cut into pieces of `length`
    characters; the last tenth of a speaker's pieces is for testing. Partition `by_key` keeps speakers apart,
    `contiguous` cuts the text into equal stretches. A text without speakers is one long speech.

    Args:
        path: the text.
        length: characters per example, at least 2.
        model: name of the model, alone or under `name` among its settings.

    Source: Caldas et al., 2019, arXiv:1812.01097 (LEAF), after McMahan et al., 2017, arXiv:1602.05629.
    """

    def __init__(self, path: Path | None = None, length: int = 64, model: str | dict[str, Any] = "lstm"):
        if length < 2:
            raise InvalidSetting("length", length, "at least 2", "80 is usual.")
        check_model(model, (NUM_TOKENS,), NUM_TOKENS)
        if path is not None:    # a server, and a client with a site of its own, do without
            existing(path, "shakespeare", ADVICE)
        self._path, self._length, self._model = path, length, model

    def model(self) -> nn.Module:
        """Return a fresh model of tokens, scores for each next one."""
        return build_model(self._model, (NUM_TOKENS,), NUM_TOKENS)

    def training_data(self, site: str | None = None) -> Samples:
        """Return the training pieces of the pool, or of a site's own text."""
        return self._load(site)[0]

    def test_data(self, site: str | None = None) -> Samples:
        """Return the test pieces of the pool, or of a site's own text."""
        return self._load(site)[1]

    def traits(self) -> Traits:
        """Return the speakers of the training pieces."""
        speakers = self._load(None)[2]
        return Traits(len(speakers), keys=speakers)

    def _load(self, site: str | None) -> tuple[Samples, Samples, np.ndarray]:
        return _read(existing(self._path if site is None else Path(site), "shakespeare", ADVICE), self._length)


@lru_cache(maxsize=4)
def _read(path: Path, length: int) -> tuple[Samples, Samples, np.ndarray]:
    train: list[np.ndarray] = []
    test: list[np.ndarray] = []
    speakers: list[int] = []
    for number, speech in enumerate(speeches(read_text(path)).values()):
        pieces = cut(encode(speech), length)
        num_test = int(TEST_SHARE * len(pieces))
        train.append(pieces[:len(pieces) - num_test])
        test.append(pieces[len(pieces) - num_test:])
        speakers += [number] * len(train[-1])
    if not speakers:
        raise UnreadableData(f"{path} holds less than {length + 1} characters of speech, too few for one example.")
    # Pieces overlap by one character: the last target of one is the first input of the next.
    tokens = [torch.from_numpy(np.concatenate(part)) for part in (train, test)]
    training, testing = (Samples(part[:, :-1], part[:, 1:].long(), transform=torch.Tensor.long) for part in tokens)
    return training, testing, np.array(speakers)


def speeches(text: str) -> dict[str, str]:
    """Return what each speaker says, in order of first appearance; all of the text when nobody is named."""
    parts = SPEAKER.split(text.replace("\r\n", "\n"))
    if len(parts) == 1:
        return {"": text}
    spoken: dict[str, str] = {}
    for name, words in zip(parts[1::2], parts[2::2], strict=True):
        spoken[name] = spoken.get(name, "") + words + "\n"
    return spoken


def encode(text: str) -> np.ndarray:
    """Return the token of each character, shape (len(text),), uint8."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    return TOKENS[np.minimum(codes, len(TOKENS) - 1)]


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """Return pieces of `length` inputs and one more token, each beginning with the last token of the one before."""
    count = max(0, (len(tokens) - 1) // length)
    starts = length * np.arange(count)
    return tokens[starts[:, None] + np.arange(length + 1)]
