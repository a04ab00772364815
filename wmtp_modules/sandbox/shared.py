"""The objects that judge and program both have, and how they stay the same.

Either side has its own copy of an object's data. The side that sends a message adds the objects
that the other does not know, and the new data of those that have changed since, so a change of an
argument, or of what an earlier call returned, is seen as if both sides were one process. Numbers
count up from 1 for objects of the program and down from -1 for those of the judge. Runs inside the
sandbox, so it uses only the standard library.
"""

import operator
import sys
from collections.abc import Callable

import wire
from kinds import BY_CLASS, BY_NAME, KNOWN, NAMES, Kind, bases, kind_of, mro, name_of

PLAIN_INT = 1 << 53  # larger ones are hexadecimal, which takes no quadratic time
FEW = 256  # objects that are looked through for unused ones before every message


class Shared:
    """One side's table of the objects that both sides know.

    Args:
        step: 1 in the program, -1 in the judge.
        mirror: makes the judge's class for one of the program's, from its name and bases.
        handle: the judge's class for objects whose class is not known. None, as ``mirror``, in the
            program, which only gets plain values.
    """

    def __init__(
        self, step: int, mirror: Callable | None = None, handle: type | None = None
    ) -> None:
        self._step, self._last = step, 0
        self._mirror, self._handle = mirror, handle
        self._objects: dict[int, object] = {}
        self._numbers: dict[int, int] = {}  # by identity
        self._agreed: dict[int, tuple[Kind, list]] = {}  # parts of those that can change
        self._new: list[int] = []
        self._look_at = 0  # size of the table at which unused objects are looked for

    def number(self, value) -> int | None:
        return self._numbers.get(id(value))

    def _add(self, number: int, value) -> None:
        self._objects[number] = value
        self._numbers[id(value)] = number

    def encode(self, values: list) -> list:
        """The JSON form of values, and the state of all objects that are new or have changed.

        Raises:
            TypeError: in the judge, for a value that is not plain.
        """
        states = []
        for number, (kind, parts) in self._agreed.items():
            now = kind.take(self._objects[number])
            if now is None:
                raise TypeError(f"a {kind.cls.__name__} no longer holds plain data")
            if not _same(kind, parts, now):
                self._agreed[number] = kind, now
                states.append([number, kind.cls.__name__, None, *map(self._part, now)])
        forms = [self._form(value) for value in values]
        while self._new:
            states.append(self._state(self._new.pop()))
        return [forms, states]

    def _part(self, value):
        """As ``_form``, but a tuple of plain values inside others needs no number."""
        cls = type(value)
        if cls is str or (cls is int and -PLAIN_INT < value < PLAIN_INT):
            return value
        if cls is tuple and all(map(_stands_for_itself, value)):
            return [None, *value]
        return self._form(value)

    def _form(self, value):
        if _stands_for_itself(value):
            return value
        if type(value) is int:
            return [hex(value)]
        number = self._numbers.get(id(value))
        if number is None:
            self._last = number = self._last + self._step
            self._add(number, value)
            self._new.append(number)
        return [number]

    def _state(self, number: int) -> list:
        value = self._objects[number]
        if id(value) in NAMES:
            return [number, "known", None, NAMES[id(value)]]
        cls = type(value)
        kind = BY_CLASS.get(id(cls)) or kind_of(cls)
        parts = None if kind is None else kind.take(value)
        if kind is None or parts is None:
            if self._mirror is not None:
                raise TypeError(
                    f"a test passes the program a {cls.__name__}: only plain values can be passed"
                )
            if any(base is type for base in mro(cls)):
                return [number, "class", None, name_of(value), *map(self._form, bases(value))]
            return [number, "object", self._form(cls) if kind is None else None]
        if kind.fill is not None:
            self._agreed[number] = kind, parts
        # The judge's own subclasses of plain classes are unknown to the program.
        made = None if cls is kind.cls or self._mirror is not None else self._form(cls)
        return [number, kind.cls.__name__, made, *map(self._part, parts)]

    def decode(self, message) -> list:
        """The values that the other side sent, after all states in the message came into force.

        Raises:
            WireError: if the other side made the message up.
        """
        try:
            forms, states = message
            waiting, fills = {}, []
            for number, *state in states:
                if type(number) is not int or type(state[0]) is not str:
                    raise wire.WireError("a state without number and kind")
                kind = BY_NAME.get(state[0])
                if number in self._agreed:
                    if self._agreed[number][0] is not kind:
                        raise wire.WireError("an object that changed its kind")
                elif number * self._step >= 0 or number in self._objects or number in waiting:
                    raise wire.WireError("a number that is taken")
                elif state[1] is None and kind is not None and kind.fill and not kind.heads:
                    self._add(number, kind.build(kind.cls))  # the most frequent ones, at once
                else:
                    waiting[number] = state
                if kind is not None and kind.fill:
                    fills.append((number, kind, state[2:]))
            for number in list(waiting):
                self._make(number, waiting)
            for number, kind, parts in fills:
                value = self._objects[number]
                kind.fill(value, list(map(self._value, parts)))
                self._agreed[number] = kind, kind.take(value)
            return list(map(self._value, forms))
        except (wire.WireError, MemoryError):
            raise
        except Exception as error:
            raise wire.WireError(f"a malformed value ({type(error).__name__})") from None

    def _make(self, number: int, waiting: dict[int, list]) -> None:
        """Make an object after those that it consists of; without recursion, as deep as it is."""
        stack, begun = [number], set()
        while stack:
            number = stack[-1]
            if number not in waiting:
                stack.pop()
                continue
            name, made, *parts = waiting[number]
            kind = BY_NAME.get(name)
            if kind is not None and kind.fill is not None:
                parts = parts[: kind.heads]  # the others may hold the object itself
            missing = [
                form[0] for form in (made, *parts) if type(form) is list and form[0] in waiting
            ]
            if not missing:
                value = self._build(name, kind, made, list(map(self._value, parts)))
                del waiting[number]
                self._add(number, value)
            elif number in begun:
                raise wire.WireError("a value that cannot be built")
            else:
                begun.add(number)
                stack += missing

    def _build(self, name: str, kind: Kind | None, made, parts: list):
        if kind is not None:
            cls = kind.cls if made is None else self._value(made)
            if cls is not kind.cls and kind_of(cls) is not kind:
                raise wire.WireError("a value of another class")
            return kind.build(cls, *parts)
        if name == "known":
            return KNOWN[parts[0]]
        if self._mirror is None or self._handle is None:
            raise wire.WireError("a value of an unknown kind")
        if name == "class":
            return self._mirror(*parts)
        if name != "object":
            raise wire.WireError("a value of an unknown kind")
        cls = self._handle if made is None else self._value(made)
        if self._handle not in mro(cls):
            raise wire.WireError("an object of another class")
        return object.__new__(cls)

    def _value(self, form):
        cls = type(form)
        if cls is int or cls is str or form is None or cls is float or cls is bool:
            return form
        if cls is not list:
            raise wire.WireError("a value without its kind")
        if form[0] is None:
            return tuple(map(self._value, form[1:]))
        (named,) = form
        return self._objects[named] if type(named) is int else int(named, 16)

    def unused(self) -> list[int]:
        """Forget what nobody but this table holds; returns the numbers, for the other side.

        Only the judge knows what its tests may still look at.
        """
        found, more = [], True
        # Again, as long as it is quick: what they held may be unused now.
        while more and (len(self._objects) < FEW or len(self._objects) >= self._look_at):
            before = len(found)
            for number in list(self._objects):
                if sys.getrefcount(self._objects[number]) == HELD_BY_TABLE:
                    self.forget([number])
                    found.append(number)
            more = len(found) > before
            self._look_at = 2 * len(self._objects)
        return found

    def forget(self, numbers: list[int]) -> None:
        for number in numbers:
            value = self._objects.pop(number)
            if self._numbers.get(id(value)) == number:  # two numbers may name one empty tuple
                del self._numbers[id(value)]
            self._agreed.pop(number, None)


def _stands_for_itself(value) -> bool:
    cls = type(value)
    if cls is int:
        return -PLAIN_INT < value < PLAIN_INT
    return value is None or cls is str or cls is bool or (cls is float and value == value)


def _same(kind: Kind, before: list, now: list) -> bool:
    """Whether parts are the same objects: equal ones would hide that True became 1."""
    if kind.text:
        return before == now
    return len(before) == len(now) and all(map(operator.is_, before, now))


_table = {0: object()}
HELD_BY_TABLE = sys.getrefcount(_table[0])
