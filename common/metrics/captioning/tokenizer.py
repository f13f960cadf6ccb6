"""Splits captions into words like coco-caption's Penn Treebank tokenizer, without Java.

Published caption scores depend on the tokenizer: `don't` is two tokens, and `t-shirt` is one. Brackets become `-lrb-`
and count as words; commas do not count. This module reproduces the observed behavior of Stanford CoreNLP's
`PTBTokenizer -preserveLines -lowerCase`. Both agree on all test strings, and on 99.9 % of 10,000 lines of licenses and
documentation. They differ in rare cases: misspelt contractions such as `don'ts`, odd addresses and telephone numbers,
scripts added to Unicode after 2010, and an initial at the end (`vitamin c.`), where the original looks at the next
caption to keep or drop the full stop.

Source: docs/papers/vx2text.md [11] (collapse white space, lower-case, tokenize, remove a list of punctuation).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

# Tokens to drop. The text is in lower case by then, so brackets (`-lrb-`) stay in spite of these entries.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Abbreviations that always keep their full stop.
_TITLES = """
adj adm adv alex assoc asst attys atty ave brig capt cf cie cmdr col cpl dak dept det dr drs elec ens ft gen gov govs
hon insp jos lt maj messrs mfg mlle mme mr mrs ms msgr mt natl p pfc ph pres prof profs pvt rep reps rev sen sens sgt
spc st ste supt treas vs wm
"""
# Abbreviations that may end a sentence: before a capital or the end of the text, another full stop is added.
_ENDINGS = """
al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dec esq est etc ext feb fla fri ga inc ind
intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont mtg neb nev nov oct okla penn plc pte pty rd rt sep
sept seq sfc sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
"""
# Abbreviations only if capitalized, and abbreviations only if a number follows.
_CAPITALIZED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED = "art ca fig figs no nos op pp prop"
# Words that the treebank splits in two -> length of the first part.
_DOUBLE = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3}
_APOSTROPHE_WORDS = (
    "ma'ams? o'clock c'mon ne'er e'er o'er hallowe'en qu'il cap'n li'l ev'ry c'est n'est nat'l s'mores ol'"
)
# If one of these follows with a capital, the full stop of an acronym or initial before it also ends the sentence.
_STARTS = """
a about according after an as at but earlier he her here however if in it last many more now once one other our she
since so some such that the their then there these they this we what when while yet you
"""

# Symbols that are spelled differently.
_SYMBOLS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u2018": "`", "\u201b": "`", "\u2039": "`", "\u203a": "'",
    "\u201c": "``", "\u00ab": "``", "\u201d": "''", "\u00bb": "''",
    "\u2013": "--", "\u2014": "--", "\u2015": "--", "\u2026": "...",
    "\u00a2": "cents", "\u00a3": "#", "\u20ac": "$", "\u20a0": "$", "\u00a4": "$",
    "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}

# Character classes. Combining marks and modifiers belong to words; superscripts and fractions don't. Characters beyond
# the basic plane are unknown, and so are symbols outside these ranges.
_MARKS = (
    "\u02c2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    "\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u06e7-\u06ed\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3"
    "\u0901-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc-\u09d7\u09e2\u09e3\u0a01-\u0a03"
    "\u0a3c-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d4e\u0e31"
    "\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_NOT_WORDS = "_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u2189\u2460-\u24ff\u2776-\u2793\U00010000-\U0010ffff"
_KNOWN_SYMBOLS = re.compile(
    "[!-~\u00a1-\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b"
    "\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u201a\u201e-\u2023"
    "\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070-\u207e\u2080-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3001"
    "\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)

_Rule = tuple[str, Callable[[str, int], "re.Match[str] | None"]]


@functools.cache
def _rules(ascii_only: bool) -> tuple[list[_Rule], list[_Rule]]:
    """Return two lists of token forms: those that start with a letter or digit, and all others."""
    if ascii_only:  # the usual case; plain character classes are faster
        letter, digit, any_ = "[A-Za-z]", "[0-9]", "[A-Za-z0-9]"
    else:
        letter = rf"(?:(?![\d{_NOT_WORDS}])[\w{_MARKS}])"
        digit = r"\d"
        any_ = rf"(?:(?![{_NOT_WORDS}])[\w{_MARKS}])"
    end = f"(?!{any_})"
    dash = "[-\u2010\u2011\u058a]"
    suffix = rf"(?i:s|d|m|ll|re|ve){end}"
    word = rf"{letter}{any_}*(?:[.!?]{letter}{any_}*)*"
    acronym = rf"{letter}(?:\.{letter})+\."
    number = rf"(?:{digit}+(?:[.,:]{digit}+)*|(?:[.,:]{digit}+)+)"
    apostrophe = (
        rf"(?:(?i:{'|'.join(_APOSTROPHE_WORDS.split())}){end}|"
        rf"(?:[A-XZ]|[dol])'(?!{suffix}){letter}{letter}+|[A-Z][a-z]*[ai]'[aeiou][a-z]*)"
    )
    abbreviation = (
        rf"(?:(?i:{'|'.join((_TITLES + _ENDINGS).split())})|"
        rf"{'|'.join(rf'(?:{one}|{one.upper()})' for one in _CAPITALIZED.split())})\."
        rf"|(?i:{'|'.join(_NUMBERED.split())})\.(?= ?{digit})"
    )
    fraction = rf"(?:{digit}{{1,4}}[- ])?{digit}{{1,4}}/{digit}{{1,4}}"
    telephone = (
        rf"(?:\({digit}{{2,3}}\)[- ]?|(?:\+{digit}{{1,3}}[- ]?|{digit}{{2,4}}[- ])?{digit}{{2,4}}[- ])"
        rf"{digit}{{3,4}}[- ]?{digit}{{3,5}}"
    )
    # A form may start inside another one. Without bounds, a long text without spaces would take forever.
    path = r"[^\s\"<>|()]{1,300}[^\s\"<>|(){}.,!?;:-]"
    host = rf"{any_}[^\s\"<>|()]{{0,300}}"
    address = r"(?:mailto:)?[A-Za-z0-9][\w.+%-]{0,63}@(?:[\w-]{1,63}\.){0,9}[\w-]{1,63}"
    alphanumeric = [
        ("double", rf"(?i:{'|'.join(_DOUBLE)})(?!{any_}|')"),
        ("negation", rf"(?:{letter}{any_}*?)?(?i:n't){end}"),
        ("abbreviation", abbreviation),
        ("acronym", acronym),
        ("acronym", r"[Pp][Hh]\.[Dd]\."),
        ("token", word),
        ("initial", rf"{letter}\."),
        ("token", rf"{any_}+"),
        ("token", rf"{any_}+(?:(?:{dash}|_){any_}+)+"),
        ("token", rf"(?:{acronym}|{abbreviation}|{apostrophe}|{word}|{number})(?:{dash}(?:{acronym}|{any_}+))+"),
        ("token", rf"{any_}+(?:{dash}{any_}+)*(?:/{any_}+(?:{dash}{any_}+)*){{1,2}}"),
        ("token", apostrophe),
        ("token", rf"[yY]'(?=(?i:all?|know){end})|[jJ]'(?=ai{end})|[dDlL]'(?!{suffix})"),
        ("token", number),
        ("fraction", fraction),
        ("telephone", telephone),
        ("token", rf"{digit}+(?:\.{digit}+)?[eE]-{digit}+|{digit}+(?:\.{digit}+)*\.[xX]{end}"),
        ("token", rf"(?:[Cc]\+\+|[CcFf]\#|[A-Z]{{1,3}}\$){end}|[A-Z]{{1,3}}\$"),
        ("token", r"[A-Z]+(?:&[A-Z]+)+(?![a-z])"),
        ("token", rf"(?i:https?)://{host}\.(?:{path}|{any_})"),
        (
            "token",
            rf"(?:(?i:www)\.(?:[\w-]{{1,63}}\.){{1,9}}[A-Za-z]{{2,}}|(?:{any_}{{1,63}}\.){{1,9}}(?i:com|edu|net|org))(?:/{path})?",
        ),
        ("token", address),
    ]
    other = [
        ("token", rf"[-+]?{number}"),
        ("fraction", fraction),
        ("telephone", telephone),
        ("token", rf"(?<!{digit})'{digit}{digit}[sS]?{end}"),
        ("suffix", rf"(?i:n't){end}|'{suffix}"),
        ("token", rf"'(?i:em|cause|til){end}|'[nN]'(?={any_})|'[nN]'?{end}"),
        ("tis", rf"'(?i:tis|twas){end}"),
        ("token", rf"\#{letter}+|@[A-Za-z_][A-Za-z0-9_]*"),
        ("brackets", rf"(?:[<>]?[:;=][-o*']?[()@|\[\]\\DPO]|[:;=]-?p|:-?\{{){end}"),
        ("brackets", r"\((?:-_-|\^_\^)\)|[-^x=~<>']_[-^x=~<>']"),
        ("tag", r"<!--.{0,1000}?-->|<[!?][A-Za-z][^<>]*>|</[A-Za-z][A-Za-z0-9_:.-]*>"),
        ("tag", r"<[A-Za-z][\w:.-]*(?: [A-Za-z][\w:.-]*(?:=(?:'[^']*'|\"[^\"]*\"))?)* ?/?>"),
        ("tag", rf"<{address}>"),
        ("entity", r"&(?i:amp|lt|gt|quot|apos|nbsp);"),
        ("token", r"&\#[0-9]+;|-[LR][RCS]B-"),
        ("ellipsis", r"\.\.\.+|\.(?: \.){2,}"),
        ("dash", r"-{2,4}(?!-)"),
        ("token", r"-{5,}|[!?]+|``|''|>>|<<|\#{2,}|\*{2,}|_+|@{2,}"),
        ("quote", '"'),
        ("apostrophe", "'"),
    ]

    def compiled(rules: list[tuple[str, str]]) -> list[_Rule]:
        return [(kind, re.compile(pattern).match) for kind, pattern in rules]

    return compiled(alphanumeric), compiled(other)


# Fast path, enough for most captions.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9]*(?=[ ,;\")]|\.?(?: |$))")
_PLAIN_PUNCTUATION = re.compile(r"[,;!?](?: |$)|\.$")
_TITLE_SET = frozenset((_TITLES + _NUMBERED).split())
_ABBREVIATIONS = frozenset((_TITLES + _ENDINGS + _CAPITALIZED.lower() + " " + _NUMBERED).split())
_OPENS = re.compile(r"[^\W_](?:[^\W_]|'(?![^\W_]))")
_CAPITAL = re.compile(r" [A-Z]")
_START = re.compile(rf" (?:{'|'.join(f'{one.capitalize()}|{one.upper()}' for one in _STARTS.split())})(?![A-Za-z])")


def ptb_tokens(text: str) -> list[str]:
    """Split a caption into lower-case tokens, including punctuation. The longest form wins, or the first if equal.

    White space separates tokens. In telephone numbers and mixed fractions, it becomes a no-break space.
    """
    written = " ".join(text.replace("\u00ad", "").split())
    text = written.replace("\u2019", "'")  # has the same length, so tokens can be cut from either text
    alphanumeric, other = _rules(text.isascii())
    tokens: list[str] = []
    position, length = 0, len(text)
    while position < length:
        if text[position] == " ":
            position += 1
            continue
        if plain := _PLAIN.match(text, position):
            token, after = plain.group().lower(), plain.end()
            stopped = text.startswith(".", after)
            if token not in _DOUBLE and not (stopped and (len(token) == 1 or token in _ABBREVIATIONS)):
                tokens.append(token)
                position = after
                continue
        if _PLAIN_PUNCTUATION.match(text, position):
            tokens.append(text[position])
            position += 1
            continue
        kind, end = "symbol", position
        for candidate, match in alphanumeric if text[position].isalnum() else other:
            found = match(text, position)
            if found and found.end() > end:
                kind, end = candidate, found.end()
        end = max(end, position + 1)
        source = text if kind in ("suffix", "negation") else written
        tokens += _spell(kind, source[position:end].lower(), text, end)
        position = end
    return tokens


def _spell(kind: str, token: str, text: str, end: int) -> list[str]:
    """Return the tokens for `token` of the form `kind`; `text[end:]` follows the token."""
    match kind:
        case "token" | "suffix":
            return [token]
        case "symbol":
            return [_SYMBOLS.get(token, token)] if _KNOWN_SYMBOLS.match(token) or token in _SYMBOLS else []
        case "double":
            return [token[: _DOUBLE[token]], token[_DOUBLE[token] :]]
        case "negation":
            return [token[:-3], "n't"] if len(token) > 3 else [token]
        case "tis":
            return ["'t", token[2:]]
        case "initial":
            return [token[0], "."] if _START.match(text, end) else [token]
        case "acronym":
            return [token, "."] if end == len(text) or _START.match(text, end) else [token]
        case "abbreviation":
            ends = token[:-1] not in _TITLE_SET and (end == len(text) or _CAPITAL.match(text, end))
            return [token, "."] if ends else [token]
        case "entity":
            return [_ENTITIES[token]] if _ENTITIES[token] else []
        case "ellipsis":
            return ["..."]
        case "dash":
            return ["--"]
        case "quote":
            return ["``" if text[end : end + 1].isalnum() else "''"]
        case "apostrophe":
            return ["`" if _OPENS.match(text, end) else "'"]
        case "tag":
            return [token.replace(" ", "\u00a0")]
        case _:  # fraction, telephone, brackets
            return [token.replace(" ", "\u00a0").replace("(", "-lrb-").replace(")", "-rrb-")]


def tokenize(text: str) -> str:
    """Return a caption's words as caption scores count them: lower case, no `PUNCTUATION`, joined by spaces.

    Examples:
        >>> tokenize("It's a dog, isn't it?")
        "it 's a dog is n't it"
    """
    return " ".join([token for token in ptb_tokens(text) if token not in PUNCTUATION])
