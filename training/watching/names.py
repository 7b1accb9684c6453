"""Names of metrics in metrics.jsonl and in trackers. `MEANINGS` says of each what the number is, and its unit."""

from __future__ import annotations

LOSS = "train/loss"
LM_LOSS = "train/lm_loss"
ALIGNMENT_LOSS = "train/alignment_loss"
ALIGNMENT_CHANCE = "train/alignment_chance"
MEMORY_KL = "train/memory_kl"
ADDRESSING_KL = "train/addressing_kl"
DISTILLATION_KL = "train/distillation_kl"
RELATION_LOSS = "train/relation_loss"
GRADIENT_NORM = "train/gradient_norm"
LEARNING_RATE = "train/learning_rate"
GLOBAL_STEP = "train/global_step"
STAGE_STEP = "train/stage_step"
EPOCH = "train/epoch"
STEP_SECONDS = "train/step_s"
SAMPLES_PER_SECOND = "train/samples_per_second"
TOKENS_PER_SECOND = "train/tokens_per_second"

EVALUATION_LOSS = "evaluation/loss"
EVALUATION_KL = "evaluation/kl"
EVALUATION_TEXT_LOSS = "evaluation/text_loss"
EVALUATION_PERPLEXITY = "evaluation/perplexity"
EVALUATION_ALIGNMENT_LOSS = "evaluation/alignment_loss"
EVALUATION_TOKEN_ACCURACY = "evaluation/token_accuracy"
EVALUATION_RECALL = "evaluation/alignment_recall_at_1"
EVALUATION_RECALL_CHANCE = "evaluation/alignment_chance"
EVALUATION_TEXT_PERPLEXITY = "evaluation/text_perplexity"
EVALUATION_EPISODE_ON = "evaluation/episode_loss_on"
EVALUATION_EPISODE_OFF = "evaluation/episode_loss_off"
EVALUATION_EPISODE_EMPTY = "evaluation/episode_loss_empty"
EVALUATION_ATTENTION_MEAN = "evaluation/attention_mean"
EVALUATION_ATTENTION_MAX = "evaluation/attention_max"
EVALUATION_ATTENTION_ENTROPY = "evaluation/attention_entropy"
EVALUATION_ATTENTION_SPARSITY = "evaluation/attention_sparsity"

MEMORY_UTILIZATION = "memory/utilization"
ADDRESSING_HEATMAP = "memory/addressing_heatmap"

ATTENTION_MEAN = "attention/mean"
ATTENTION_MAX = "attention/max"
ATTENTION_ENTROPY = "attention/entropy"
ATTENTION_SPARSITY = "attention/sparsity"
ATTENTION_DIVERGENCE = "attention/divergence"
ATTENTION_DRIFT_P = "attention/drift_p"
ATTENTION_HEATMAP = "attention/heatmap"

LEJEPA_IMAGE = "lejepa/image_features"
LEJEPA_IMAGE_P = "lejepa/image_features_p"
LEJEPA_TEXT = "lejepa/text_features"
LEJEPA_TEXT_P = "lejepa/text_features_p"
LEJEPA_LATENTS = "lejepa/memory_latents"
LEJEPA_LATENTS_P = "lejepa/memory_latents_p"

TRAINABLE_PARAMS = "model/trainable_params"
TOTAL_PARAMS = "model/total_params"
MODEL_MEMORY = "model/memory_usage"

MEANINGS = {
    LOSS: "weighted sum of the stage's losses that the optimiser minimises, in nats",
    LM_LOSS: "cross entropy of the answer's tokens, mean over tokens, in nats",
    ALIGNMENT_LOSS: "symmetric contrastive loss of pictures and their texts, in nats",
    ALIGNMENT_CHANCE: "alignment loss of a model that knows nothing: ln of the pairs in a batch, in nats",
    MEMORY_KL: "KL of the memory's posterior from its prior, mean over elements, in nats",
    ADDRESSING_KL: "KL of the addressing weights from their prior, mean over elements, in nats",
    DISTILLATION_KL: "KL of the student's next token from the teacher's, in nats",
    RELATION_LOSS: "KL of the student's attention relations from the teacher's, in nats",
    EVALUATION_KL: "KL of the student's next token from the teacher's on held-out texts, in nats",
    EVALUATION_TEXT_LOSS: "cross entropy of held-out texts, mean over tokens, in nats",
    GRADIENT_NORM: "Euclidean norm of all gradients before clipping, no unit",
    LEARNING_RATE: "rate of the first parameter group in this step, no unit",
    GLOBAL_STEP: "optimiser steps since the run began, over all stages",
    STAGE_STEP: "optimiser steps since this stage began",
    EPOCH: "passes over the training data in this stage, with a fraction",
    STEP_SECONDS: "seconds of a step and of waiting for its batch, mean over steps",
    SAMPLES_PER_SECOND: "pictures or episodes trained on per second of wall clock, over all processes",
    TOKENS_PER_SECOND: "tokens that count in the loss per second of wall clock, over all processes",
    EVALUATION_LOSS: "cross entropy on held-out samples, or a text stage's KL from its teacher, in nats a token",
    EVALUATION_PERPLEXITY: "exp of the cross entropy on held-out samples, no unit",
    EVALUATION_ALIGNMENT_LOSS: "alignment loss on held-out pictures, in nats",
    EVALUATION_TOKEN_ACCURACY: "share of held-out tokens that are the model's first choice, 0 to 1",
    EVALUATION_RECALL: "share of held-out pictures whose own text is the nearest, 0 to 1",
    EVALUATION_RECALL_CHANCE: "that share for a model that knows nothing, 0 to 1",
    EVALUATION_TEXT_PERPLEXITY: "perplexity of the decoder alone on plain text, no unit",
    EVALUATION_EPISODE_ON: "cross entropy of held-out episodes' answers with their memory, in nats",
    EVALUATION_EPISODE_OFF: "cross entropy of held-out episodes' answers without the memory's slot, in nats",
    EVALUATION_EPISODE_EMPTY: "cross entropy of held-out episodes' answers with an empty memory, in nats",
    EVALUATION_ATTENTION_MEAN: "attention/mean on held-out samples, 0 to 1",
    EVALUATION_ATTENTION_MAX: "attention/max on held-out samples, 0 to 1",
    EVALUATION_ATTENTION_ENTROPY: "attention/entropy on held-out samples, in nats",
    EVALUATION_ATTENTION_SPARSITY: "attention/sparsity on held-out samples, 0 to 1",
    MEMORY_UTILIZATION: "share of the memory's slots that addressing uses: exp(entropy of the mean weights) / slots",
    ADDRESSING_HEATMAP: "picture of addressing weights: addressing steps x slots",
    ATTENTION_MEAN: "mean attention of a text token to the prefix embeddings together, 0 to 1",
    ATTENTION_MAX: "largest attention of a text token to one prefix embedding, mean over tokens, 0 to 1",
    ATTENTION_ENTROPY: "entropy of a text token's attention over the prefix embeddings, mean over tokens, in nats",
    ATTENTION_SPARSITY: "share of attention weights on prefix embeddings that are below a tenth of even ones, 0 to 1",
    ATTENTION_DIVERGENCE: "Jensen-Shannon divergence of attention from the one before the stage, in nats, 0 to ln 2",
    ATTENTION_DRIFT_P: "p-value of that drift on held-out pictures, by swaps within pictures, 0 to 1",
    ATTENTION_HEATMAP: "picture of attention: text tokens x prefix embeddings",
    LEJEPA_IMAGE: "Epps-Pulley statistic of held-out pictures' alignment features: 1.05 if spread evenly, no unit",
    LEJEPA_IMAGE_P: "p-value of that statistic under evenly spread features, 0 to 1",
    LEJEPA_TEXT: "the same statistic of their captions' alignment features: 1.05 if spread evenly, no unit",
    LEJEPA_TEXT_P: "p-value of that statistic, 0 to 1",
    LEJEPA_LATENTS: "the same statistic of their memory latents: 1.05 if spread evenly, no unit",
    LEJEPA_LATENTS_P: "p-value of that statistic, 0 to 1",
    TRAINABLE_PARAMS: "parameters that the stage trains, a count",
    TOTAL_PARAMS: "parameters of the model, a count",
    MODEL_MEMORY: "bytes of the model's parameters and buffers",
}
"""Name -> what the number is, and its unit."""
