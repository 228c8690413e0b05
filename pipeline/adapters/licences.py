"""Licences of adapters: what a model card declares, and what that says of a merge of several.

A card's front matter names a licence by an id of the Hub, most of them SPDX's in lower case, or as `other` with a name and a
link. The rules below judge by that name alone: no derivatives, non-commercial, share-alike, permissive. Of any other name they
say that its terms are not known.

They cannot judge whether the card says the truth, what the licences of the base model and of the training data ask for, what
the terms of `other` or of a model family are, nor what the law of a country makes of merged weights. A sentence from here says
where to look before a mashup is passed on; that there is none is no permission. This is not legal advice.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from pipeline.adapters.card import Fields, text

NO_DERIVATIVES = re.compile(r"\bcc-by-(nc-)?nd\b")
NON_COMMERCIAL = re.compile(r"\bcc-by-nc\b|non-?commercial|\bresearch\b")
SHARE_ALIKE = re.compile(r"\bcc-by-(nc-)?sa\b|\b[al]?gpl|\b(cdla-sharing|epl|eupl|gfdl|mpl|odbl|osl)\b")
PERMISSIVE = re.compile(
    r"(afl|apache|bsd|bsd-[23]-clause|cc-by|cc0|cdla-permissive|isc|mit|odc-by|pddl|unlicense|wtfpl|zlib)(-\d[\d.]*)?"
)

LINK = re.compile(r" \(\S+\)$")

UNKNOWN = "unknown"
"""The Hub's id for a licence that nobody declared."""


def declared_licence(fields: Fields) -> str | None:
    """The licence that the front matter of a model card declares, in lower case; `other: name (link)` where it is one of its own.

    Returns:
        None where no licence is declared.
    """
    named = (text(fields.get("license")) or UNKNOWN).lower()
    if named != "other":
        return None if named == UNKNOWN else named
    name, link = text(fields.get("license_name")), text(fields.get("license_link"))
    return named + (f": {name}" if name else "") + (f" ({link})" if link else "")


def front_matter(licences: Collection[str | None]) -> dict[str, str]:
    """What the front matter of a merge's card says, given the licence of each donor: theirs if it is one, else `other` with a
    name that lists them, spelled as the Hub wants it."""
    distinct = sorted({licence or UNKNOWN for licence in licences})
    if len(distinct) == 1 and re.fullmatch(r"[a-z0-9.+-]+", distinct[0]) and distinct[0] != "other":
        return {"license": distinct[0]}
    return {"license": "other", "license_name": "-and-".join(map(_slug, distinct))}


def conflicts(donors: Mapping[str, str | None]) -> str | None:
    """A sentence that names what stands against passing on a merge; None where the names of the licences tell of nothing.

    Args:
        donors: the licence of each, None where it declares none.
    """
    clauses = list(_clauses(donors))
    return f"To be settled before the mashup is passed on: {'; '.join(clauses)}." if clauses else None


def _clauses(donors: Mapping[str, str | None]) -> Iterator[str]:
    distinct = set(donors.values())
    all_non_commercial = all(licence and _is(NON_COMMERCIAL, licence) for licence in distinct)
    for licence in sorted(filter(None, distinct)):
        named = f"{licence} of {', '.join(name for name, its in donors.items() if its == licence)}"
        kinds = [kind for kind in (NO_DERIVATIVES, NON_COMMERCIAL, SHARE_ALIKE) if _is(kind, licence)]
        if NO_DERIVATIVES in kinds:
            yield f"{named} allows no derivatives, and a merge is one"
        if len(distinct) == 1:
            continue
        if NON_COMMERCIAL in kinds and not all_non_commercial:
            yield f"{named} is for non-commercial use alone, which then holds for the merge"
        if SHARE_ALIKE in kinds:
            yield f"{named} asks for the same licence on what is made from it"
        if not kinds and not _is_permissive(licence):
            yield f"the terms of {named} are not known here"
    if silent := [name for name, licence in donors.items() if not licence]:
        yield f"no licence is declared by {', '.join(silent)}"


def _is(kind: re.Pattern[str], licence: str) -> bool:
    return bool(kind.search(_slug(licence)))


def _is_permissive(licence: str) -> bool:
    """Whether a licence, or each of several, is one that asks for little more than to be named."""
    return all(PERMISSIVE.fullmatch(_slug(part)) for part in licence.split(", "))


def _slug(licence: str) -> str:
    """The name alone, as the Hub spells names: `cc-by-nc-4.0` for `CC BY-NC 4.0`, `my-own` for `other: My Own (link)`."""
    name = licence.removeprefix("other: ")
    return _spelled(name if name == licence else LINK.sub("", name)) or "other"


def _spelled(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
