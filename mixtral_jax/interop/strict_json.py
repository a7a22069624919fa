"""JSON objects from files that nobody has checked, and how an error quotes what they hold."""

from __future__ import annotations

import json

from mixtral_jax.config import InputError

LONGEST_QUOTE = 100


def quote(value: object) -> str:
    """A value as an error shows it: on one line, and not longer than about 100 characters."""
    if isinstance(value, int) and value.bit_length() > 8 * LONGEST_QUOTE:
        return "a huge number"  # which Python may refuse to print
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"  # may nest deeper than repr can follow
    text = repr(value[: LONGEST_QUOTE + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."


def one_line(path: object) -> str:
    """A path, or any text: as it is where it prints on one line, else with escapes."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def parse_object(data: bytes, name: str) -> dict:
    """A JSON object from UTF-8 bytes.

    It costs about 25 bytes of memory for each byte of JSON at worst, so that callers bound `data`.

    Args:
      data: the text.
      name: what it is, as errors name it.

    Raises:
      InputError: not UTF-8, not JSON, not an object, a key twice, or nested too deeply.
    """

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
