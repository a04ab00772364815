"""The plain classes whose data passes between program and judge, also that of their subclasses.

``take`` reads a value with the functions of the plain class itself, so nothing that a subclass
overrides is asked, and ``build`` and ``fill`` make such data again. What a value is equal to is
thus decided by its data alone. Data that is read more than once to compare (what a view is of, what
a ``UserDict`` holds) must itself be plain: of an object of the program, each reading might differ.
Runs inside the sandbox, so it uses only the standard library.
"""

import builtins
import datetime
import gc
from array import array
from collections import (
    ChainMap,
    Counter,
    OrderedDict,
    UserDict,
    UserList,
    UserString,
    abc,
    defaultdict,
    deque,
)
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

# What a class cannot lie about, whatever its metaclass overrides.
mro = type.__dict__["__mro__"].__get__
bases = type.__dict__["__bases__"].__get__
name_of = type.__dict__["__name__"].__get__


class Kind(NamedTuple):
    """How values of a plain class and of its subclasses are read and made.

    Args:
        take: the parts of a value; None if it holds what is not plain.
        build: makes a value of a class from its parts; one that can change, from the first
            ``heads`` of them.
        fill: sets all parts of a value that can change; None for others.
        text: whether the parts are strings made anew at every reading.
    """

    cls: type
    take: Callable
    build: Callable
    fill: Callable | None = None
    heads: int = 0
    text: bool = False


def _slot(cls: type, name: str):
    """The descriptor of an attribute, which reads it whatever a subclass overrides."""
    return getattr(cls, name)


def _fields(cls: type, *names: str) -> Callable:
    reads = [_slot(cls, name).__get__ for name in names]
    return lambda value: [read(value) for read in reads]


def _pairs(parts: list):
    return zip(parts[::2], parts[1::2], strict=True)


def _is_a(value, *classes: type) -> bool:
    """As ``isinstance``, but by the class that a value cannot lie about."""
    return not set(map(id, classes)).isdisjoint(map(id, mro(type(value))))


def _fill_list(value, parts: list) -> None:
    list.__setitem__(value, slice(None), parts)


def _fill_set(value, parts: list) -> None:
    set.clear(value)
    set.update(value, parts)


def _new_deque(made, longest: int | None) -> deque:
    value = deque.__new__(made)
    deque.__init__(value, (), longest)  # sets maxlen, which nothing else does
    return value


def _fill_deque(value, parts: list) -> None:
    deque.clear(value)
    deque.extend(value, parts[1:])


def _fill_dict(value, parts: list) -> None:
    if list(dict.keys(value)) != parts[::2]:  # else a test may be iterating over it
        dict.clear(value)
    dict.update(value, _pairs(parts))


def _fill_ordered(value, parts: list) -> None:
    if list(OrderedDict.keys(value)) != parts[::2]:
        OrderedDict.clear(value)
    for key, item in _pairs(parts):
        OrderedDict.__setitem__(value, key, item)


def _fill_default(value, parts: list) -> None:
    _slot(defaultdict, "default_factory").__set__(value, parts[0])
    _fill_dict(value, parts[1:])


def _fill_array(value, parts: list) -> None:
    array.__delitem__(value, slice(None))
    array.frombytes(value, parts[1].encode("latin-1"))


def _bytes_kind(cls: type) -> Kind:
    return Kind(
        cls,
        lambda value: [cls.decode(value, "latin-1")],
        lambda made, text: cls.__new__(made, text.encode("latin-1")),
    )


def _holder(cls: type, name: str, *plain: type) -> Kind:
    """A class written in Python that holds its data in one attribute."""
    own = cls.__dict__["__dict__"].__get__

    def take(value):
        held = dict.get(own(value), name)
        return [held] if _is_a(held, *plain) else None

    def fill(value, parts: list) -> None:
        if not _is_a(*parts, *plain):
            raise TypeError(f"a {cls.__name__} of another class")
        own(value)[name] = parts[0]

    return Kind(cls, take, object.__new__, fill)


def _take_maps(value):
    maps = dict.get(_dict_of_chain(value), "maps")
    plain = type(maps) is list and all(_is_a(each, dict) for each in maps)
    return list(maps) if plain else None


def _fill_maps(value, parts: list) -> None:
    if not all(_is_a(each, dict) for each in parts):
        raise TypeError("a ChainMap of other classes")
    _dict_of_chain(value)["maps"] = parts


_dict_of_chain = ChainMap.__dict__["__dict__"].__get__
_dict_of_namespace = SimpleNamespace.__dict__["__dict__"].__get__


def _fill_namespace(value, parts: list) -> None:
    own = _dict_of_namespace(value)
    own.clear()
    own.update({str.__str__(name): item for name, item in _pairs(parts)})


def _viewed(value):
    """The dict behind a view or a proxy of one; None if it is another mapping."""
    (behind,) = gc.get_referents(value)
    return [behind] if _is_a(behind, dict) else None


def _view_kinds():
    for owner in (dict, OrderedDict):
        for name in ("keys", "items", "values"):
            method = getattr(owner, name)
            yield Kind(type(method(owner())), _viewed, lambda _, held, method=method: method(held))
    # Those of other mappings, which have no data of their own: as they are at the moment.
    yield Kind(abc.KeysView, list, lambda _, *keys: abc.KeysView(dict.fromkeys(keys)))
    yield Kind(
        abc.ItemsView,
        lambda value: [part for key, item in value for part in (key, item)],
        lambda _, *parts: abc.ItemsView(dict(_pairs(list(parts)))),
    )
    yield Kind(abc.ValuesView, list, lambda _, *items: abc.ValuesView(dict(enumerate(items))))


def _build_proxy(_, held) -> MappingProxyType:
    if not _is_a(held, dict):
        raise TypeError("a proxy of another class")
    return MappingProxyType(held)


def _zone(offset: datetime.timedelta | None):
    return offset if offset is None else datetime.timezone(offset)


def _time_kind(cls: Any, *names: str) -> Kind:
    """Times of day; the time zone is reduced to its offset, which is what compares."""
    fields = _fields(cls, *names)
    return Kind(
        cls,
        lambda value: [*fields(value), cls.utcoffset(value)],
        lambda made, *parts: cls.__new__(made, *parts[:-1], _zone(parts[-1])),
    )


def _error_kind(cls: type) -> Kind:
    def build(made, *arguments):
        try:
            error = cls.__new__(made, *arguments)
            cls.__init__(error, *arguments)
        except Exception:  # the arguments are the program's, and may be no such error's
            error = Exception(*arguments)
        return error

    if issubclass(cls, BaseExceptionGroup):  # whose members must be there when it is made
        return Kind(cls, _fields(cls, "message", "exceptions"), build)
    return Kind(cls, lambda value: list(_slot(BaseException, "args").__get__(value)), build)


def _build_fraction(made, numerator: int, denominator: int) -> Fraction:
    data, value = Fraction(numerator, denominator), object.__new__(made)
    for name in Fraction.__slots__:  # a subclass sets no attributes here
        _slot(Fraction, name).__set__(value, getattr(data, name))
    return value


CLOCK = ("hour", "minute", "second", "microsecond")
ERRORS = [
    value
    for value in vars(builtins).values()
    if isinstance(value, type) and issubclass(value, BaseException)
]
KINDS = [
    Kind(int, lambda value: [int.__int__(value)], int.__new__),
    Kind(float, lambda value: [float.__repr__(value)], float.__new__),
    Kind(str, lambda value: [str.__str__(value)], str.__new__),
    Kind(
        complex,
        lambda value: list(map(float.__repr__, _fields(complex, "real", "imag")(value))),
        lambda made, real, imaginary: complex.__new__(made, float(real), float(imaginary)),
    ),
    _bytes_kind(bytes),
    _bytes_kind(bytearray)._replace(
        build=bytearray.__new__,
        fill=lambda value, parts: bytearray.__setitem__(
            value, slice(None), parts[0].encode("latin-1")
        ),
        text=True,
    ),
    Kind(list, list.copy, list.__new__, _fill_list),
    Kind(
        tuple,
        lambda value: list(tuple.__iter__(value)),
        lambda made, *parts: tuple.__new__(made, parts),
    ),
    Kind(set, lambda value: list(set.__iter__(value)), set.__new__, _fill_set),
    Kind(
        frozenset,
        lambda value: list(frozenset.__iter__(value)),
        lambda made, *parts: frozenset.__new__(made, parts),
    ),
    Kind(
        deque,
        lambda value: [deque.maxlen.__get__(value), *deque.__iter__(value)],
        _new_deque,
        _fill_deque,
        heads=1,
    ),
    Kind(dict, lambda value: list(chain(*dict.items(value))), dict.__new__, _fill_dict),
    Kind(Counter, lambda value: list(chain(*dict.items(value))), dict.__new__, _fill_dict),
    Kind(
        OrderedDict,
        lambda value: list(chain(*OrderedDict.items(value))),
        OrderedDict.__new__,
        _fill_ordered,
    ),
    Kind(
        defaultdict,
        lambda value: [
            _slot(defaultdict, "default_factory").__get__(value),
            *chain(*dict.items(value)),
        ],
        defaultdict.__new__,
        _fill_default,
    ),
    Kind(
        array,
        lambda value: [
            array.typecode.__get__(value),
            array.tobytes(value).decode("latin-1"),
        ],
        array.__new__,
        _fill_array,
        heads=1,
        text=True,
    ),
    _holder(UserList, "data", list),
    _holder(UserDict, "data", dict),
    _holder(UserString, "data", str),
    Kind(ChainMap, _take_maps, object.__new__, _fill_maps),
    Kind(
        SimpleNamespace,
        lambda value: list(chain(*_dict_of_namespace(value).items())),
        SimpleNamespace.__new__,
        _fill_namespace,
    ),
    *_view_kinds(),
    Kind(MappingProxyType, _viewed, _build_proxy),
    Kind(
        memoryview,
        lambda value: [
            memoryview.format.__get__(value),
            memoryview.tobytes(value).decode("latin-1"),
        ],
        lambda _, form, text: memoryview(text.encode("latin-1")).cast(form),
    ),
    Kind(range, _fields(range, "start", "stop", "step"), range.__new__),
    Kind(slice, _fields(slice, "start", "stop", "step"), slice.__new__),
    Kind(Decimal, lambda value: [Decimal.__str__(value)], Decimal.__new__),
    Kind(Fraction, _fields(Fraction, *Fraction.__slots__), _build_fraction),
    Kind(
        datetime.timedelta,
        _fields(datetime.timedelta, "days", "seconds", "microseconds"),
        datetime.timedelta.__new__,
    ),
    Kind(
        datetime.timezone,
        lambda value: [datetime.timezone.utcoffset(value, None)],
        datetime.timezone.__new__,
    ),
    Kind(datetime.date, _fields(datetime.date, "year", "month", "day"), datetime.date.__new__),
    _time_kind(datetime.time, *CLOCK),
    _time_kind(datetime.datetime, "year", "month", "day", *CLOCK),
    *map(_error_kind, ERRORS),
]

# By identity: a class of the program may have a metaclass without a hash.
BY_CLASS = {id(kind.cls): kind for kind in KINDS}
BY_NAME = {kind.cls.__name__: kind for kind in KINDS}
# What is passed by name: classes (MBPP 533 passes one to a program) and single values.
KNOWN = {kind.cls.__name__: kind.cls for kind in KINDS}
KNOWN |= {"bool": bool, "object": object, "NoneType": type(None)}
KNOWN |= {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
NAMES = {id(value): name for name, value in KNOWN.items()}


def kind_of(cls: type) -> Kind | None:
    """The kind of the nearest plain base class, if there is one."""
    for base in mro(cls):
        if id(base) in BY_CLASS:
            return BY_CLASS[id(base)]
    return None
