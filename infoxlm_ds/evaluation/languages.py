"""Languages as results group them: codes of ISO 639-3, families, and the sets that papers give means of.

Families are as in XTREME (Hu et al., 2020), for Indo-European its branches.
"""

from __future__ import annotations

import re

# ISO 639-3 code and family, by ISO 639-1 code. A macrolanguage also has the code of the member that corpora hold.
LANGUAGES = {
    "af": ("afr", "Germanic"),
    "ar": ("ara", "Semitic"),
    "az": ("aze", "Turkic"),
    "be": ("bel", "Slavic"),
    "bg": ("bul", "Slavic"),
    "bn": ("ben", "Indo-Aryan"),
    "br": ("bre", "Celtic"),
    "bs": ("bos", "Slavic"),
    "ca": ("cat", "Romance"),
    "cs": ("ces", "Slavic"),
    "cy": ("cym", "Celtic"),
    "da": ("dan", "Germanic"),
    "de": ("deu", "Germanic"),
    "el": ("ell", "Greek"),
    "en": ("eng", "Germanic"),
    "eo": ("epo", "constructed"),
    "es": ("spa", "Romance"),
    "et": ("est", "Uralic"),
    "eu": ("eus", "Basque"),
    "fa": ("pes", "Iranian"),
    "fi": ("fin", "Uralic"),
    "fr": ("fra", "Romance"),
    "ga": ("gle", "Celtic"),
    "gl": ("glg", "Romance"),
    "gu": ("guj", "Indo-Aryan"),
    "he": ("heb", "Semitic"),
    "hi": ("hin", "Indo-Aryan"),
    "hr": ("hrv", "Slavic"),
    "hu": ("hun", "Uralic"),
    "hy": ("hye", "Armenian"),
    "id": ("ind", "Austronesian"),
    "is": ("isl", "Germanic"),
    "it": ("ita", "Romance"),
    "ja": ("jpn", "Japonic"),
    "jv": ("jav", "Austronesian"),
    "ka": ("kat", "Kartvelian"),
    "kk": ("kaz", "Turkic"),
    "km": ("khm", "Austroasiatic"),
    "kn": ("kan", "Dravidian"),
    "ko": ("kor", "Koreanic"),
    "lt": ("lit", "Baltic"),
    "lv": ("lvs", "Baltic"),
    "mk": ("mkd", "Slavic"),
    "ml": ("mal", "Dravidian"),
    "mn": ("mon", "Mongolic"),
    "mr": ("mar", "Indo-Aryan"),
    "ms": ("zsm", "Austronesian"),
    "my": ("mya", "Sino-Tibetan"),
    "nb": ("nob", "Germanic"),
    "ne": ("nep", "Indo-Aryan"),
    "nl": ("nld", "Germanic"),
    "nn": ("nno", "Germanic"),
    "no": ("nor", "Germanic"),
    "pa": ("pan", "Indo-Aryan"),
    "pl": ("pol", "Slavic"),
    "pt": ("por", "Romance"),
    "ro": ("ron", "Romance"),
    "ru": ("rus", "Slavic"),
    "si": ("sin", "Indo-Aryan"),
    "sk": ("slk", "Slavic"),
    "sl": ("slv", "Slavic"),
    "sq": ("sqi", "Albanian"),
    "sr": ("srp", "Slavic"),
    "sv": ("swe", "Germanic"),
    "sw": ("swh", "Niger-Congo"),
    "ta": ("tam", "Dravidian"),
    "te": ("tel", "Dravidian"),
    "th": ("tha", "Kra-Dai"),
    "tl": ("tgl", "Austronesian"),
    "tr": ("tur", "Turkic"),
    "uk": ("ukr", "Slavic"),
    "ur": ("urd", "Indo-Aryan"),
    "uz": ("uzb", "Turkic"),
    "vi": ("vie", "Austroasiatic"),
    "yo": ("yor", "Niger-Congo"),
    "zh": ("zho", "Sino-Tibetan"),
}
SHORT = {long: short for short, (long, _) in LANGUAGES.items()} | {
    **{"arb": "ar", "azj": "az", "ekk": "et", "fas": "fa", "khk": "mn", "lav": "lv", "msa": "ms"},
    **{"nep": "ne", "npi": "ne", "swa": "sw", "uzn": "uz", "als": "sq", "cmn": "zh", "zlm": "ms"},
}
# Languages besides English of which papers give the mean accuracy on Tatoeba: XTREME, and XNLI's (InfoXLM, table 2).
SETS = {
    "XTREME's 36": "af ar bg bn de el es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr nl pt ru sw ta te th tl tr "
    "ur vi zh",
    "InfoXLM's 14": "ar bg de el es fr hi ru sw th tr ur vi zh",
}


def short_code(code: str) -> str:
    """The code with ISO 639-1's two letters for 639-3's three, where there are two: deu is de. Others stay."""
    return SHORT.get(code, code)


def family(code: str) -> str:
    """The family of a language; variants such as pt_BR have their language's. "other" if it is not in the table."""
    return LANGUAGES.get(base(code), ("", "other"))[1]


def base(code: str) -> str:
    """The language of a variant: pt of pt_BR, zh of cmn-Hans."""
    return short_code(re.split("[_-]", code)[0].lower())
