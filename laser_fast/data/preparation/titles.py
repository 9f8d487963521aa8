"""Film titles put right: "Usual Suspects, The" of 1995 becomes "The Usual Suspects (1995)".

Catalogues sort titles by their first real word, so articles stand behind a comma, also inside parentheses. A language
model knows the films by the names people use.
"""

import re

# with a capital, as catalogues write them: "Cry, the Beloved Country" and "To Have, or Not" keep their commas;
# "I" and "As" are left out because titles end in them more often than in an Italian or Portuguese article
_ARTICLES = (
    "The", "A", "An",
    "Le", "La", "Les", "L'", "L\u2019", "Un", "Une", "Des",
    "Il", "Lo", "Gli", "Uno", "Una",
    "El", "Los", "Las", "Unos", "Unas",
    "Der", "Die", "Das", "Den", "Dem", "Ein", "Eine",
    "De", "Het", "Een",
    "Det", "En", "Ett", "Et",
    "O", "Os",
)  # fmt: skip
_TRAILING_ARTICLE = re.compile(rf"^(?P<rest>.*\S),\s+(?P<article>{'|'.join(map(re.escape, _ARTICLES))})$", re.DOTALL)
_TRAILING_YEAR = re.compile(r"^(?P<rest>.*\S)\s*\((?P<year>\d{4})\)$", re.DOTALL)
_YEAR = re.compile(r"\d{4}")
_GROUP = re.compile(r"\(([^()]*)\)")
_MISSPELT = {"unkonwn": "unknown"}  # MovieLens-100K, item 267


def _article_first(phrase: str) -> str:
    match = _TRAILING_ARTICLE.match(phrase.strip())
    if match is None:
        return phrase.strip()
    article, rest = match["article"], match["rest"]
    return article + rest if article.endswith(("'", "\u2019")) else f"{article} {rest}"


def normalize_title(title: str, year: str = "") -> str:
    """`title` with articles in front, in the name and in each alternative name in parentheses, and the year behind.

    Args:
        title: as in the catalogue; a year in parentheses at its end counts as the year.
        year: of release; used if it has four digits and the title brings none.

    Returns:
        The title, e.g. `normalize_title("Boot, Das", "1981") == "Das Boot (1981)"`; "" stays "".
    """
    title = " ".join(title.split())
    title = _MISSPELT.get(title, title)
    year = year.strip() if _YEAR.fullmatch(year.strip()) else ""
    if match := _TRAILING_YEAR.match(title):
        title, year = match["rest"], match["year"]
    if not title:
        return ""
    name, *groups = re.split(r"(?=\()", title, maxsplit=1)
    fixed = _article_first(name)
    if groups:
        alternatives = _GROUP.sub(lambda group: f"({_article_first(group[1])})", groups[0])
        fixed = f"{fixed} {alternatives}".strip()
    return f"{fixed} ({year})" if year else fixed
