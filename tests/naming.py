"""What a message must name, whatever the sentence around it."""

import re


def naming(*facts: object) -> str:
    """Return a regular expression that finds all `facts` as whole words, in any order.

    A fact is the name of a field, a key, a file or a tensor, or a value: what a reader of the
    message needs, and what stays when the sentence is worded anew.
    """
    words = (rf"(?=.*(?<!\w){re.escape(str(fact))}(?!\w))" for fact in facts)
    return r"(?s)\A" + "".join(words)


def names(text: str, *facts: object) -> bool:
    """Whether `text` holds all `facts` as whole words."""
    return re.search(naming(*facts), text) is not None
