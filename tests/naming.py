"""Check which values and names an error message contains, independent of its wording."""

import re


def naming(*facts: object) -> str:
    """Return a regular expression that finds all `facts` as whole words, in any order.

    A fact is what a message must contain in any wording: a value, or the name of a field, key, file
    or tensor.
    """
    words = (rf"(?=.*(?<!\w){re.escape(str(fact))}(?!\w))" for fact in facts)
    return r"(?s)\A" + "".join(words)


def names(text: str, *facts: object) -> bool:
    """Return whether `text` contains all `facts` as whole words."""
    return re.search(naming(*facts), text) is not None
