"""Decodes a row's new tokens as they arrive, and finds the first stop string."""

from collections.abc import Sequence

from torchtune.models.llama2 import Llama2Tokenizer

_INCOMPLETE = "\ufffd"  # what an incomplete or invalid character decodes to


class NewText:
    """Decodes token by token what the new tokens add to the text of the prompt.

    A token's text depends on the one before it: SentencePiece drops a space at the beginning of a
    text, and a character may be spread over several byte tokens. The decoded window therefore
    starts with the last token whose text is final, and that token's text is removed. The window
    stays a few tokens long, so the cost of a row is linear in its length.
    """

    def __init__(
        self, tokenizer: Llama2Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._decode = tokenizer.decode
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._window = [prompt[-1]]
        self._shown = len(self._decode(self._window))  # characters of the window that are not new

    def push(self, token: int) -> bool:
        """Add a token; True if it completes a stop string, after which nothing may be added."""
        self._window.append(token)
        if not self._stop:
            return False  # decoded at the end, all at once
        new = self._decode(self._window)[self._shown :]
        if new.endswith(_INCOMPLETE):
            return False
        # A stop string that begins further to the left would have been found earlier.
        start = max(0, len(self._text) - self._longest + 1)
        self._text += new
        found = [i for i in (self._text.find(stop, start) for stop in self._stop) if i >= 0]
        alone = len(self._decode([token]))
        if alone:
            self._window, self._shown = [token], alone
        else:  # a control token or a single space would look like the beginning of a text
            self._shown += len(new)
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    @property
    def text(self) -> str:
        """Text of the tokens so far, up to a stop string."""
        return self._text + self._decode(self._window)[self._shown :]
