"""Image classification: folders, formats, augmentation, models, accuracy."""

from ...extras import require_extra

require_extra("images", "PIL", importing=__name__)
