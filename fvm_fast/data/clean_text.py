# SPDX-License-Identifier: Apache-2.0
"""Text repair before tokenisation: what CLIP's tokenizer asks of ftfy, html and str, without ftfy.

Covered, in ftfy's order and repeated until nothing changes: HTML entities (only in lines before the first ``<``), C1
control characters read as Windows-1252, Latin ligatures, half- and full-width forms, curly quotes, line breaks,
surrogates, terminal colour codes, invisible control characters, NFC. Then HTML entities twice more, white space
collapsed, lower case.

Not covered: mojibake. Text that was decoded with the wrong encoding ("cafÃ©" for "café") stays as it is.
"""

import html
import re
import unicodedata
from itertools import chain

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_C1_CONTROL = re.compile("[\x80-\x9f]")
_LINE_BREAK = re.compile("\r\n|[\r\x85\u2028\u2029]")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_TERMINAL_ESCAPE = re.compile("\x1b\\[[0-9;]*[a-zA-Z]")
_NEEDS_REPAIR = re.compile("[^\t\n\f\r -%'-~]")  # anything but plain ASCII without "&"

_LIGATURES = {ord(c): unicodedata.normalize("NFKC", c) for c in "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"} | {ord("ﬅ"): "\u017ft"}
_WIDTHS = {code: unicodedata.normalize("NFKC", chr(code)) for code in chain([0x3000], range(0xFF01, 0xFFF0))}
_QUOTES = dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
_INVISIBLE = dict.fromkeys(
    chain(range(0x09), [0x0B], range(0x0E, 0x20), [0x7F], range(0x206A, 0x2070), [0xFEFF], range(0xFFF9, 0xFFFD))
)


def clean_text(text: str) -> str:
    """Repair one string, collapse its white space and lower its case.

    >>> clean_text("Caf&eacute;   O&rsquo;Neill\\n “ﬁne”")
    'café o\\'neill "fine"'
    """
    if _NEEDS_REPAIR.search(text):
        text = html.unescape(html.unescape(_repair(text)))
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    lines, entities = [], True
    for line in text.split("\n"):
        entities = entities and "<" not in line  # a tag means markup, where entities may be meant literally
        lines.append(_repair_line(line, entities))
    return "\n".join(lines)


def _repair_line(line: str, entities: bool) -> str:
    before = None
    while line != before:
        before = line
        if entities:
            line = _ENTITY.sub(_unescape, line)
        line = _C1_CONTROL.sub(_read_as_windows_1252, line)
        line = line.translate(_LIGATURES).translate(_WIDTHS).translate(_QUOTES)
        line = _LINE_BREAK.sub("\n", line)
        line = _LONE_SURROGATE.sub("\ufffd", _SURROGATE_PAIR.sub(_join_surrogates, line))
        line = _TERMINAL_ESCAPE.sub("", line).translate(_INVISIBLE)
        line = unicodedata.normalize("NFC", line)
    return line


def _unescape(match: re.Match) -> str:
    """One whole entity; also names shouted in capitals (``&EACUTE;``), which html.unescape does not know."""
    entity = match[0]
    known = html.unescape(entity)
    if known == entity and entity.isupper():
        small = html.unescape(entity.lower())
        return entity if ";" in small else small.upper()
    return entity if ";" in known else known


def _read_as_windows_1252(match: re.Match) -> str:
    return match[0].encode("latin-1").decode("cp1252", errors="ignore") or match[0]


def _join_surrogates(match: re.Match) -> str:
    return match[0].encode("utf-16", "surrogatepass").decode("utf-16")
