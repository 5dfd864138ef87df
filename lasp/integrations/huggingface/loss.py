"""Labels as Transformers hands them over."""

from torch import Tensor

from lasp.config import require
from lasp.integrations.huggingface.batch import Batch, described, is_integers
from lasp.models.loss import IGNORE


def next_labels(batch: Batch, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """[B, T]: the label of each column's next token, from labels, or as the caller shifted them; -100 at padding."""
    for name, given in (("shift_labels", shift_labels), ("labels", labels)):
        if given is not None:
            shape = list(batch.valid.shape)
            fits = is_integers(given) and list(given.shape) == shape
            require(fits, name, described(given), f"integers {shape}, a label for each token")
            given = given.to(batch.valid.device).long()
            return given.masked_fill(~batch.valid, IGNORE) if name == "shift_labels" else batch.next_labels(given)
    return None


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError unless all ids are in the vocabulary."""
    if ids.numel():
        least, most = (int(bound) for bound in ids.aminmax())
        inside = least >= 0 and most < vocabulary
        require(inside, name, f"{least} to {most}", f"0 to {vocabulary - 1}, the vocabulary")
