"""What sparse attention keeps and loses: recall, its estimate, its lower bound."""

from .measure import (
    MEASURES,
    MapView,
    Measures,
    frame_starts,
    map_density,
    measure_recall,
    view_map,
)
from .recall import (
    BlockLogits,
    block_logits,
    estimated_recall,
    exact_recall,
    key_radius,
    recall_bound,
)
from .recorder import AttentionRecord, average, record_attention, to_rows

__all__ = [
    "MEASURES",
    "AttentionRecord",
    "BlockLogits",
    "MapView",
    "Measures",
    "average",
    "block_logits",
    "estimated_recall",
    "exact_recall",
    "frame_starts",
    "key_radius",
    "map_density",
    "measure_recall",
    "recall_bound",
    "record_attention",
    "to_rows",
    "view_map",
]
