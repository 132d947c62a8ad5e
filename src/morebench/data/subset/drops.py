"""Why a row of the input is not in the subset."""

from enum import StrEnum


class Drop(StrEnum):
    """Of the first group every row is counted, of the second the candidates that were looked at."""

    no_id = "no usable id"
    no_caption = "no caption"
    caption_not_text = "caption is not text"
    not_downloaded = "status is not success"
    no_image = "no image in the shard"
    no_place = "no path of an image"
    too_large = "file too large"
    refused_member = "tar member is a link, a device or outside"

    missing_image = "image is missing"
    outside = "image path, or a link on it, leads outside"
    unusable_image = "image cannot be used"
    duplicate_id = "id was taken before"
    duplicate_image = "image was taken before"
    in_other_source = "image is in the other source's half"
