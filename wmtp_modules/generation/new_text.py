"""The text of a row's new tokens, and the first stop string in it, found as tokens arrive."""

from collections.abc import Sequence

from torchtune.models.llama2 import Llama2Tokenizer

_INCOMPLETE = "\ufffd"  # what bytes decode to that are no whole character, or not yet


class NewText:
    """Decodes token by token: what the new tokens add to the text of the prompt.

    A token's text depends on the one before it: SentencePiece drops a space at the beginning of a
    text, and a character may be spread over several byte tokens. So a window is decoded that
    begins with the last token whose text is final, and that token's text is cut off. The window
    stays a few tokens long, so the cost of a row is linear in its length.

    Args:
        tokenizer: decodes ids.
        prompt: ids of the prompt.
        stop: strings that end the text; it is cut before the first.
    """

    def __init__(
        self, tokenizer: Llama2Tokenizer, prompt: Sequence[int], stop: tuple[str, ...]
    ) -> None:
        self._decode = tokenizer.decode
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._text = ""
        self._window = [prompt[-1]]
        self._shown = len(self._decode(self._window))  # characters that are no new text any more

    def push(self, token: int) -> bool:
        """Take one token; True if it completes a stop string. Nothing may follow it then."""
        self._window.append(token)
        if not self._stop:
            return False  # decoded at the end, all at once
        new = self._decode(self._window)[self._shown :]
        if new.endswith(_INCOMPLETE):
            return False
        # A stop string that begins further to the left was complete, and found, before.
        start = max(0, len(self._text) - self._longest + 1)
        self._text += new
        found = [i for i in (self._text.find(stop, start) for stop in self._stop) if i >= 0]
        alone = len(self._decode([token]))
        if alone:
            self._window, self._shown = [token], alone
        else:  # a control token or a single space: it would look like the beginning of a text
            self._shown += len(new)
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    @property
    def text(self) -> str:
        """Text of the tokens so far, up to the stop string if there was one."""
        return self._text + self._decode(self._window)[self._shown :]
