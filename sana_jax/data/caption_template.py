"""Captions from one text for a whole folder, beside those that pictures have of their own.

    a photo of sks dog               the caption of every picture that has none of its own
    a photo of a {name}, {folder}    the same, with the name of the file and of its folder in it
    {caption}, in the style of sks   made of the picture's own caption, which it must have

`name` is without its ending, and both names have spaces for underscores. A brace is written twice.
"""

import hashlib
import posixpath
import string

from sana_jax.data.images import BadImage
from sana_jax.data.records import Record, Source
from sana_jax.runtime.checks import MAX_TEXT
from sana_jax.runtime.errors import UserError

FIELDS = "name", "folder", "caption"
WAYS = (
    'give config.data.caption="a photo of sks dog" for all pictures, a .txt file beside each of'
    ' them, or a template such as config.data.caption="a photo of {folder}"'
)


class CaptionTemplate:
    """Makes the captions of a record.

    Attributes:
      text: the template.
      fields: the names in it that stand for something else.
    """

    def __init__(self, text: str, root: str = ""):
        """
        Args:
          text: the template.
          root: the `folder` of pictures that are in no subfolder.

        Raises UserError for a text without words, or with another field than FIELDS.
        """
        where, self.text, self.root = "config.data.caption", text, root
        if not text.strip():
            raise UserError(f"{where} has no words; {WAYS}")
        if len(text) > MAX_TEXT:
            raise UserError(f"{where} has {len(text)} characters, {MAX_TEXT} at most")
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{where}={text!r:.60}: {error}; a brace is written twice") from None
        self.fields = {field for _, field, _, _ in parts if field is not None}
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        if unknown := sorted(self.fields - {*FIELDS}):
            raise UserError(f"{where}: {{{unknown[0]}}} is no field; there are {known}")
        if any(form or conversion for _, _, form, conversion in parts):
            raise UserError(f"{where}={text!r:.60}: a field is its name alone, such as {known}")

    def __call__(self, record: Record) -> list[str]:
        """Returns the captions of a record. Raises BadImage where its own is missing."""
        own = [caption for caption in record["captions"] if caption.strip()]
        if "caption" not in self.fields and own:
            return record["captions"]
        if "caption" in self.fields and not own:
            raise BadImage("bad_caption", "it has no caption of its own, for {caption}")
        folder, file = posixpath.split(record["key"])
        names = {
            "name": posixpath.splitext(file)[0].replace("_", " "),
            "folder": (posixpath.basename(folder) or self.root).replace("_", " "),
        }
        return [self.text.format(**names, caption=caption) for caption in own or [""]]


class Captioned:
    """A source whose records have the captions of a template."""

    def __init__(self, source: Source, template: CaptionTemplate):
        self._source, self._template = source, template
        root = template.root if "folder" in template.fields else ""
        text = f"{source.fingerprint}\n{root}\n{template.text}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        try:
            captions = self._template(record)
        except BadImage as error:
            error.key = record["key"]
            raise
        if captions == record["captions"]:
            return record
        scores = record["scores"] if "caption" in self._template.fields else []
        return record | {"captions": captions, "scores": scores}

    @property
    def places(self) -> list[tuple[str, int, int]] | None:
        return getattr(self._source, "places", None)
