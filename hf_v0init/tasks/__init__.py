"""What the scripts' tasks need beside a v0: flags and stages, losses and metrics, streams, the training of a GAN."""

from ..extras import require_extra
from ..third_party_messages import drop_known_messages

require_extra("scripts", importing=__name__)
drop_known_messages()
