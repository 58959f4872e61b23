"""Where the texts of a corpus come from and under which licences, as its description states it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from infoxlm_ds.config import Place, UserError
from infoxlm_ds.data.manifest import load_manifest

OTHER = "other"
# The hub refuses a card that names another licence. https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-2.5 cc-by-3.0 "
    "cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 "
    "cdla-sharing-1.0 ecl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 "
    "lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 osl-3.0 pddl postgresql unlicense wtfpl zlib"
)


@dataclass(frozen=True)
class Origin:
    """A source of texts as CORPUS.yaml describes it. An empty string: not stated."""

    name: str
    license: str
    homepage: str


def origins_of(corpus: Place) -> list[Origin]:
    """The sources that a corpus was built from. Empty if it is not there any more."""
    try:
        prep = load_manifest(corpus).prep
    except (UserError, OSError):
        return []
    return [
        Origin(source["name"], source.get("license") or "", source.get("homepage") or "")
        for description in _descriptions(prep)
        for source in description["sources"]
    ]


def _descriptions(prep: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for part in prep.get("merged", ()):
        yield from _descriptions(part["prep"])
    if "description" in prep:
        yield prep["description"]


def licence_of(origins: Sequence[Origin]) -> str:
    """The licence of the texts if all sources state the same one and the hub knows it, else OTHER."""
    stated = {origin.license.lower() for origin in origins}
    return stated.pop() if len(stated) == 1 and stated <= set(_LICENCES.split()) else OTHER
