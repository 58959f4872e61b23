"""What a language code says: which scripts its texts use, and which languages are too near to tell apart."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

# First and last code points of the blocks that hold a script's letters (Unicode's Blocks.txt), in ISO 15924's codes.
# Rare ones beyond U+FFFF are left out: `re` takes much longer with them.
BLOCKS = {
    "Arab": "0600-06FF 0750-077F 0870-08FF FB50-FDFF FE70-FEFC",
    "Armn": "0530-058F FB13-FB17",
    "Beng": "0980-09FF",
    "Bopo": "3100-312F 31A0-31BF",
    "Cans": "1400-167F 18B0-18FF",
    "Cher": "13A0-13FF AB70-ABBF",
    "Cyrl": "0400-052F 1C80-1C8F A640-A69F",
    "Deva": "0900-097F A8E0-A8FF",
    "Ethi": "1200-139F 2D80-2DDF AB00-AB2F",
    "Geor": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "Grek": "0370-03FF 1F00-1FFF",
    "Gujr": "0A80-0AFF",
    "Guru": "0A00-0A7F",
    "Hang": "1100-11FF 3130-318F A960-A97F AC00-D7FF FFA0-FFDC",
    "Hani": "3005-3007 3400-4DBF 4E00-9FFF F900-FAFF",
    "Hebr": "0590-05FF FB1D-FB4F",
    "Java": "A980-A9DF",
    "Kana": "3040-30FF 31F0-31FF FF66-FF9F",  # Hiragana and Katakana
    "Khmr": "1780-17FF",
    "Knda": "0C80-0CFF",
    "Laoo": "0E80-0EFF",
    "Latn": "0041-005A 0061-007A 00C0-02AF 1E00-1EFF 2C60-2C7F A722-A7FF AB30-AB64 FB00-FB06 FF21-FF3A FF41-FF5A",
    "Mlym": "0D00-0D7F",
    "Mong": "1800-18AF",
    "Mymr": "1000-109F A9E0-A9FF AA60-AA7F",
    "Nkoo": "07C0-07FF",
    "Olck": "1C50-1C7F",
    "Orya": "0B00-0B7F",
    "Sinh": "0D80-0DFF",
    "Sund": "1B80-1BBF",
    "Syrc": "0700-074F 0860-086F",
    "Taml": "0B80-0BFF",
    "Telu": "0C00-0C7F",
    "Tfng": "2D30-2D7F",
    "Thaa": "0780-07BF",
    "Thai": "0E00-0E7F",
    "Tibt": "0F00-0FFF",
}
# Scripts that are written together with others, as a code may name them.
TOGETHER = {"Hans": "Hani Bopo", "Hant": "Hani Bopo", "Jpan": "Hani Kana", "Hira": "Kana", "Kore": "Hang Hani"}
# The languages of XLM-R, of the corpus that comes with the project, and some of their neighbours.
LANGUAGES = {
    "Arab": "ar arz ckb fa ha kk ks ku ky ms pa ps sd ug ur uz",
    "Armn": "hy",
    "Beng": "as bn",
    "Cyrl": "az ba be bg bs ce cv kk ku ky mk mn ru sr tg tk tt ug uk uz",
    "Deva": "bho hi ks mai mr ne sa sd",
    "Ethi": "am om ti",
    "Geor": "ka",
    "Grek": "el",
    "Gujr": "gu",
    "Guru": "pa",
    "Hans": "yue zh",
    "Hebr": "he iw yi",
    "Java": "jv",
    "Jpan": "ja",
    "Khmr": "km",
    "Knda": "kn",
    "Kore": "ko",
    "Laoo": "lo",
    "Latn": "af an ast az bs br ca ceb cs cy da de en eo es et eu fi fil fo fr fur fy ga gd gl gsw ha hr ht hu ia id "
    "ig is it jv kab kk ku la lb lt lv mg mi ms mt nb nds nl nn no ny oc om pl pt rm ro rw sc scn sk sl sn so sq sr st "
    "su sv sw tk tl tn tr ts ug uz vec vi wa wo xh yo zu",
    "Mlym": "ml",
    "Mong": "mn",
    "Mymr": "my",
    "Orya": "or",
    "Sinh": "si",
    "Sund": "su",
    "Taml": "ta",
    "Telu": "te",
    "Thaa": "dv",
    "Thai": "th",
    "Tibt": "bo dz",
}
# Identifiers confuse these with each other, and their short texts are often equal.
NEAR = (
    "da nb nn no sv",
    "bs hr sh sl sr cnr",
    "id jv ms su",
    "cs sk",
    "an ast ca es gl oc pt",
    "be bg mk ru sr uk",
    "af de fy lb li nds nl gsw",
    "co fur it la lmo sc scn vec",
    "ar arz fa",
    "az crh tk tr",
    "ba kk ky tt",
    "bho hi mai mr ne sa",
    "fil tl ceb",
    "yue zh wuu",
    "en sco",
    "ga gd",
    "xh zu",
    "as bn",
    "ps ur sd",
    "ku kmr ckb",
)


@functools.cache
def base(code: str) -> str:
    """The language of a code without script and country: `zh` of `zh-Hant` and of `zh_TW`."""
    return re.split("[-_]", code, maxsplit=1)[0].lower()


@functools.cache
def scripts(code: str) -> frozenset[str]:
    """The scripts of a language, or the one that its code names; empty if it is unknown."""
    named = {part for part in re.split("[-_]", code)[1:] if part in BLOCKS or part in TOGETHER}
    found = named or {script for script, codes in LANGUAGES.items() if base(code) in codes.split()}
    return frozenset(part for script in found for part in TOGETHER.get(script, script).split())


@functools.cache
def are_near(one: str, other: str) -> bool:
    """Whether two codes name the same language or near ones."""
    pair = {base(one), base(other)}
    return len(pair) == 1 or any(pair <= set(group.split()) for group in NEAR)


@functools.cache
def letters(script: str) -> str:
    """The letters of a script, for a character class of `re`."""
    blocks = ((int(end, 16) for end in block.split("-")) for block in BLOCKS[script].split())
    return ranges(code for first, last in blocks for code in range(first, last + 1) if chr(code).isalpha())


def ranges(codes: Iterable[int]) -> str:
    """Ascending code points, for a character class of `re`."""
    found: list[list[int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"\\U{first:08X}-\\U{last:08X}" for first, last in found)
