"""JSON objects from files that nobody has checked, and how an error quotes what they hold.

Also what we write of numbers that JSON has not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mixtral_jax.config import InputError

LONGEST_QUOTE = 100
LARGEST = 2**24
"""No size of a model is larger, but lengths in tokens."""


def quote(value: object) -> str:
    """A value as an error shows it: on one line, and not longer than about 100 characters."""
    if isinstance(value, int) and value.bit_length() > 8 * LONGEST_QUOTE:
        return "a huge number"  # which Python may refuse to print
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"  # may nest deeper than repr can follow
    text = repr(value[: LONGEST_QUOTE + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it holds no half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def finite(value: Any) -> Any:
    """A value as JSON has it: None for a float that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_POINTER = b"version https://git-lfs"


def refuse_pointer(data: bytes, name: str) -> None:
    """Raises InputError if a file begins as those that Git LFS leaves in place of large ones."""
    if data.startswith(_POINTER):
        raise InputError(f"{name} is a Git LFS pointer, not the file itself: run git lfs pull")


def parse_object(data: bytes, name: str) -> dict:
    """A JSON object from UTF-8 bytes.

    It costs about 25 bytes of memory for each byte of JSON at worst, so that callers bound `data`.

    Args:
      data: the text.
      name: what it is, as errors name it.

    Raises:
      InputError: not UTF-8, not JSON, not an object, a key twice, or nested too deeply.
    """
    refuse_pointer(data, name)

    def unique(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{name}: {quote(twice)} stands there twice")
        return made

    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: byte {error.start} of it") from None
    except RecursionError:
        raise InputError(f"{name} is JSON that is nested too deeply") from None
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python reads no numbers of thousands of digits
        raise InputError(f"{name}: a number with thousands of digits") from None
    if not isinstance(values, dict):
        raise InputError(f"{name} must be a JSON object, not {quote(values)}")
    return values


class Reader:
    """The values of an object in a file, checked as they are asked for.

    Every method takes a key, and raises an InputError that names the file and the key.

    Args:
      values: the object.
      name: the file, as errors name it.
      inside: the keys that lead to the object, with a dot after each.
    """

    def __init__(self, values: Mapping[str, Any], name: str, inside: str = "") -> None:
        self._values, self.name, self._inside = values, name, inside

    def error(self, key: str, wanted: str) -> InputError:
        """What to raise for the value of a key."""
        if key not in self._values:
            return InputError(f"{self.name}: {self._inside}{key} is missing: {wanted}")
        shown = quote(self._values[key])
        return InputError(f"{self.name}: {self._inside}{key}={shown} {wanted}")

    def given(self, key: str) -> bool:
        """Whether a key is there and not null."""
        return self._values.get(key) is not None

    def size(self, key: str, most: int = LARGEST) -> int:
        """A whole number from 1; booleans and 8.0 are none."""
        value = self._values.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(key, f"must be a whole number from 1 to {most}")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self._values.get(key)
        good = type(value) is float or (type(value) is int and value.bit_length() < 100)
        if not good or not math.isfinite(value) or not value > 0:
            raise self.error(key, "must be a number above 0")
        return float(value)

    def coefficient(self, key: str) -> float:
        """A number from 0."""
        if type(self._values.get(key)) in (int, float) and self._values[key] == 0:
            return 0.0
        return self.number(key)

    def text(self, key: str) -> str | None:
        """Text, or None where the key is absent or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be text")
        return value

    def section(self, key: str) -> Reader | None:
        """The object under a key, or None where it is absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return Reader(value, self.name, f"{self._inside}{key}.")

    def allow(self, key: str, *allowed: object, fix: str = "") -> None:
        """Refuse what is neither absent, null nor one of `allowed`; `fix` ends the message."""
        value = self._values.get(key)
        # By type too, since 0 == False.
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            wanted = " or ".join(["null", *(quote(a).lower().strip("'") for a in allowed)])
            raise self.error(key, f"must be {wanted}, as Mixtral has it{fix}")
