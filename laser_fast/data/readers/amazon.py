"""Amazon Reviews 2018 and 2023 as published: reviews and metadata, one JSON object a line, mostly gzipped.

2018 (Ni et al. 2019): reviews with `reviewerID`, `asin`, `overall`, `unixReviewTime` (seconds); metadata with `asin`,
`title`, `brand`, `category` (list) and `description` (list); some products are listed twice. 2023 (Hou et al. 2024):
reviews with `user_id`, `parent_asin`, `rating`, `timestamp` (milliseconds); metadata with `parent_asin`, `title`,
`store`, `categories` (list) and `description` (list). Any key may be missing from an object of the metadata.
"""

from dataclasses import dataclass
from typing import Literal

from laser_fast.data.readers.interactions import InteractionColumns

AmazonRelease = Literal["2018", "2023"]


@dataclass(frozen=True)
class AmazonColumns:
    """Names in the files of one release: of reviews, and for every text field its key in the metadata."""

    reviews: InteractionColumns
    item_id: str
    fields: dict[str, str]
    time_unit: Literal["s", "ms"]


AMAZON: dict[AmazonRelease, AmazonColumns] = {
    "2018": AmazonColumns(
        InteractionColumns("reviewerID", "asin", "unixReviewTime", "overall"),
        "asin",
        {"title": "title", "brand": "brand", "categories": "category", "description": "description"},
        "s",
    ),
    "2023": AmazonColumns(
        InteractionColumns("user_id", "parent_asin", "timestamp", "rating"),
        "parent_asin",
        {"title": "title", "brand": "store", "categories": "categories", "description": "description"},
        "ms",
    ),
}
PARAGRAPHS = dict.fromkeys(("description", "feature", "features"), " ")
"""Lists whose entries are sentences, not names."""
