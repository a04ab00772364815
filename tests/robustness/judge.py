"""What counts as a clear error."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable

# What Python says to a programmer and not to a user.
PYTHON = re.compile(
    r"Traceback|NoneType|object is not|object has no attribute|index out of range|KeyError|"
    r"not subscriptable|not iterable|unexpected keyword|positional argument|unhashable|"
    r"codec can't|must be str|has no len|not supported between|invalid literal|unpack|"
    r"recursion|list indices|string indices|integer division|<class "
)


class Judge:
    """Calls what reads a damaged input, and keeps what came of it."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []

    def judge(self, kind: str, what: str, names: Iterable[str], call: Callable) -> bool:
        """Whether the call ran; if not, it has to have said one clear thing.

        Args:
            kind: under which it is counted.
            what: says which damage this is, to find it again.
            names: at least one of them has to stand in the error.
            call: reads the input.
        """
        try:
            call()
        except (ValueError, OSError, SystemExit) as error:
            self.outcomes[kind, "refused"] += 1
            text = str(error)
            raw = isinstance(error, UnicodeError | json.JSONDecodeError)
            if raw or PYTHON.search(text) or not any(name in text for name in names):
                self._problem(kind, what, error)
        except Exception as error:
            self.outcomes[kind, "failed"] += 1
            self._problem(kind, what, error)
        else:
            self.outcomes[kind, "ran"] += 1
            return True
        return False

    def _problem(self, kind: str, what: str, error: BaseException) -> None:
        where = error.__traceback__
        while where.tb_next:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
        text = f"{type(error).__name__}: {str(error)[:300]}"
        self.problems.append(f"{kind} {what}: {text} ({place})")
        print(self.problems[-1])

    def report(self) -> str:
        """How many ran and how many were refused, by kind."""
        kinds = sorted({kind for kind, _ in self.outcomes})
        columns = ("ran", "refused", "failed")
        rows = [(kind, *(self.outcomes[kind, c] for c in columns)) for kind in kinds]
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        return "\n".join(f"{k:28}{a:5} ran{b:5} refused{c:3} failed" for k, a, b, c in rows)
