"""Titles as catalogues write them, against titles as people write them."""

import pytest

from laser_fast.data import normalize_title

CASES = [
    ("Usual Suspects, The", "1995", "The Usual Suspects (1995)"),
    ("Toy Story", "1995", "Toy Story (1995)"),
    ("Close Shave, A", "1995", "A Close Shave (1995)"),
    ("American Werewolf in London, An", "1981", "An American Werewolf in London (1981)"),
    ("Postino, Il", "1994", "Il Postino (1994)"),
    ("Promesse, La", "1996", "La Promesse (1996)"),
    ("Boot, Das", "1981", "Das Boot (1981)"),
    ("Bewegte Mann, Der", "1994", "Der Bewegte Mann (1994)"),
    ("Misérables, Les", "1995", "Les Misérables (1995)"),
    ("Enfer, L'", "1994", "L'Enfer (1994)"),
    ("Enfer, L\u2019", "1994", "L\u2019Enfer (1994)"),
    ("Double vie de Véronique, La (Double Life of Veronique, The)", "1991",
     "La Double vie de Véronique (The Double Life of Veronique) (1991)"),
    ("Horseman on the Roof, The (Hussard sur le toit, Le)", "1995",
     "The Horseman on the Roof (Le Hussard sur le toit) (1995)"),
    ("Star Maker, The (Uomo delle stelle, L')", "1995", "The Star Maker (L'Uomo delle stelle) (1995)"),
    ("Convent, The (Convento, O)", "1995", "The Convent (O Convento) (1995)"),
    ("Seventh Seal, The (Sjunde inseglet, Det)", "1957", "The Seventh Seal (Det Sjunde inseglet) (1957)"),
    ("Tin Drum, The (Blechtrommel, Die)", "1979", "The Tin Drum (Die Blechtrommel) (1979)"),
    ("Fille seule, La (A Single Girl)", "1995", "La Fille seule (A Single Girl) (1995)"),
    ("Hate (Haine, La)", "1995", "Hate (La Haine) (1995)"),
    ("Maybe, Maybe Not (Bewegte Mann, Der)", "1994", "Maybe, Maybe Not (Der Bewegte Mann) (1994)"),
    ("Seven (Se7en)", "1995", "Seven (Se7en) (1995)"),
    ("Mrs. Brown (Her Majesty, Mrs. Brown)", "1997", "Mrs. Brown (Her Majesty, Mrs. Brown) (1997)"),
    ("I, Worst of All (Yo, la peor de todas)", "1990", "I, Worst of All (Yo, la peor de todas) (1990)"),
    ("Cry, the Beloved Country", "1995", "Cry, the Beloved Country (1995)"),
    ("To Have, or Not", "1995", "To Have, or Not (1995)"),
    ("Sex, Lies, and Videotape", "1989", "Sex, Lies, and Videotape (1989)"),
    ("20,000 Leagues Under the Sea", "1954", "20,000 Leagues Under the Sea (1954)"),
    ("Paris, Texas", "1984", "Paris, Texas (1984)"),
    ("Truth or Consequences, N.M.", "1997", "Truth or Consequences, N.M. (1997)"),
    ("Cook the Thief His Wife & Her Lover, The", "1989", "The Cook the Thief His Wife & Her Lover (1989)"),
    ("Land Before Time III: The Time of the Great Giving (1995)", "V",
     "Land Before Time III: The Time of the Great Giving (1995)"),
    ("Usual Suspects, The (1995)", "", "The Usual Suspects (1995)"),
    ("Usual Suspects, The (1995)", "1995", "The Usual Suspects (1995)"),
    ("City of Lost Children, The (Cité des enfants perdus, La) (1995)", "",
     "The City of Lost Children (La Cité des enfants perdus) (1995)"),
    ("unkonwn", "unkonwn", "unknown"),
    ("1984", "1984", "1984 (1984)"),
    ("  Toy   Story ", " 1995 ", "Toy Story (1995)"),
    ("Toy Story", "", "Toy Story"),
    ("", "1995", ""),
    ("The", "1995", "The (1995)"),
    ("(Untitled)", "2009", "(Untitled) (2009)"),
    ("Half (open, The", "1999", "Half (open, The (1999)"),
]  # fmt: skip


@pytest.mark.parametrize("title, year, expected", CASES, ids=[case[0] or "empty" for case in CASES])
def test_title(title: str, year: str, expected: str) -> None:
    assert normalize_title(title, year) == expected


@pytest.mark.parametrize("title", [case[2] for case in CASES])
def test_a_title_put_right_stays(title: str) -> None:
    assert normalize_title(title) == title
