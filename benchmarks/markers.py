"""Texts between markers, `<!-- name --> ... <!-- /name -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping


def marked(text: str, sections: Mapping[str, str], path: str) -> str:
    """A text with other sections between their markers; `path` is named in errors.

    Raises:
        ValueError: a section has no place, or several.
    """
    for name, section in sections.items():
        block = "\n".join(filter(None, [f"<!-- {name} -->", section, f"<!-- /{name} -->"]))
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{path} has {count} places for {name}")
    return text
