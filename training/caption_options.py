"""Options of a `captions` stage: which parts learn and how fast, episodes, weights of the losses, and the teacher."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from microvlm.memory.ordinal_questions import ORDINALS

Weight = Annotated[float, Meta(ge=0, le=1e6)]
Share = Annotated[float, Meta(ge=0, le=1)]
Selector = Annotated[
    str, Meta(pattern=r"^(all|[a-z][a-z0-9_.]*?(\.(last\d{1,4}|\d{1,4}-\d{1,4}))?)\Z", max_length=100)
]
"""Names parameters: `all`, a part (`adapter`), a module (`decoder.layers.3`), layers 20 to 23
(`decoder.layers.20-23`) or the last four (`decoder.layers.last4`)."""

NEW_PARTS = ("adapter", "memory_encoder", "memory_projection", "memory_prior", "scope")
"""The parts that no pretrained model brings."""


class TeacherOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Distillation from the model that the stage starts from (BitDistill, arXiv 2510.13998, section 3).

    The teacher computes in float; the student has the stage's `decoder_bits`.
    """

    temperature: Annotated[float, Meta(gt=0, le=100)] = 5.0
    """tau of KL(teacher || student) tau^2 on the answers' tokens."""
    logits_weight: Weight = 1.0
    relation_weight: Weight = 1000.0
    """Weight of the attention relations of Q, K and V, the mean over rows of the KL divergence (eq. 9)."""
    relation_depth: Share = 0.75
    """The one layer whose relations are compared, as a share of all layers."""
    relation_heads: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Groups into which a layer's Q, K and V are split for their relations."""
    device: Annotated[str, Meta(pattern=r"^(cpu|cuda(:\d{1,2})?)\Z")] | None = None
    """Where the teacher computes: `cpu`, `cuda` or `cuda:1`; null for the student's own device."""
    kept_gb: Annotated[float, Meta(ge=0, le=10_000)] = 2.0
    """Memory for a teacher's outputs on texts, 10^9 bytes. They are kept where a run sees every text at least twice and
    they fit; 0 for never."""


class CaptionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a `captions` stage trains, and on what."""

    trained: dict[Selector, Annotated[float, Meta(ge=0, le=1000)]] = msgspec.field(
        default_factory=lambda: dict.fromkeys(NEW_PARTS, 1.0)
    )
    """Parameters that learn -> their rate, relative to `learning_rate`; 0 freezes. The longest match decides; what
    nothing matches is frozen."""
    episode_length: Annotated[int, Meta(ge=0, le=len(ORDINALS))] = 4
    """Images that are written into one memory before one of them is asked for; 0 for no episodes."""
    episode_share: Share = 0.5
    """Share of a batch's pictures that stand in episodes."""
    memory_rows: Share = 0.5
    """Share of the other rows that see a memory that has nothing to say about them: half of these rows one of other
    pictures, half an empty one. The rest see none: their slot is masked."""
    alignment_weight: Weight = 0.1
    """Symmetric contrastive loss of image and text features."""
    memory_kl_weight: Weight = 0.01
    """KL divergence of the memory from its prior, per element (Larimar, arXiv 2403.11901, eq. 5)."""
    addressing_kl_weight: Weight = 0.001
    """KL divergence of the noisy keys from N(0, 1), per element."""
    address_log_variance: Annotated[float, Meta(ge=-30, le=0)] = -6.0
    """Log variance of the noise on keys in training."""
    scope_weight: Weight = 0.1
    """Binary cross-entropy of the scope detector: episodes are known, everything else is not."""
    teacher: TeacherOptions | None = None
