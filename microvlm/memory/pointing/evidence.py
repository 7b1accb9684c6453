"""Shares of the log's rows in a reading of a state, and the evidence that the row with the largest one is meant.

Writing to a prior R0 by recursive least squares makes what a key w reads the mixture

    w M - w R0 = sum_i c_i (z_i - w_i R0)

of the rows i of that state, and of nothing else. So the shares c are solved from what was *read*, with the log as the
dictionary: rows that the state lacks get none, and a reading that is no mixture of the log's rows is seen by what is
left over (`residual`). A search of the log by its keys could see neither. Plain numpy in float64; knows no text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from microvlm.configuration.pointing import EVIDENCE
from microvlm.runtime import MemoryArrays

MOST_RESIDUAL = 0.02
"""Largest part of a reading, by length, that no row of the log explains. Float32 leaves 1e-5; a state with other rows
than the log's leaves a tenth and more."""
LEAST_OWN_SHARE = 0.05
"""Least share of a row in what its own key reads. It is over .2 in a full state of `nano`, and rounding alone (1e-3)
for a row that the state lacks."""
SAME_SHARE = 1e-3
"""Rows under one key have equal shares but for rounding."""
_SAME_KEY = 1e-6
"""Of a key's squared length: the squared distance of keys that count as one."""
_RIDGE = 1e-6
_LEAST_LENGTH = 1e-6
_LEAST_OWN = 1e-2
_LEAST_DISTANCE = 1e-4
"""Between cosines: two pictures, or two wordings, that agree as far count as the same."""
_TINY = 1e-12


class Rows(NamedTuple):
    """Rows of the log, oldest first."""

    keys: np.ndarray
    """w [E, K]."""
    latents: np.ndarray
    """z [E, C]."""
    cues: np.ndarray
    """Latents of the rows' questions [E, C]; zeros where the log has none."""
    picture_keys: np.ndarray
    """Keys of the rows' pictures alone [E, K]; zeros without a picture."""
    question_keys: np.ndarray
    """Keys of the rows' words alone [E, K]; zeros where the log has neither of the two."""
    has_picture: np.ndarray
    """bool [E]."""

    def take(self, indices: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(*(part[indices] for part in self))


class Readings(NamedTuple):
    """Questions and what the state returned for them."""

    keys: np.ndarray
    """w [N, K]."""
    latents: np.ndarray
    """Latents of the questions [N, C]."""
    read: np.ndarray
    """z_r [N, C]."""
    scope: np.ndarray
    """Probability of the scope detector [N]."""
    picture_keys: np.ndarray
    """Keys of the questions' pictures alone [N, K]; zeros without a picture."""
    question_keys: np.ndarray
    """Keys of the questions' words alone [N, K]."""


class Pointed(NamedTuple):
    """Where readings point."""

    row: np.ndarray
    """int [N], the row with the largest share; -1 where the reading is none of the log's or no row is in the state."""
    evidence: np.ndarray
    """float64 [N, len(EVIDENCE)]."""


def point(
    readings: Readings, state: MemoryArrays, prior: np.ndarray, log: Rows, indices: np.ndarray
) -> Pointed:
    """Where readings of `state` (batch 1) point: places in `indices`, its rows of the whole `log`. prior [K, C] is R0.

    Of rows under one key the newest is taken. Other states' rows can make a reading less sure, and nothing else.
    """
    count, rows = len(readings.keys), log.take(indices)
    if not len(indices):
        return Pointed(np.full(count, -1), np.zeros((count, len(EVIDENCE))))
    keys, mean, covariance = (np.asarray(part, np.float64) for part in (readings.keys, *_first(state)))
    row_keys, row_latents = np.asarray(rows.keys, np.float64), np.asarray(rows.latents, np.float64)
    differences = row_latents - row_keys @ prior
    solve = _solver(differences)
    read = readings.read - keys @ prior
    mixture = solve(read)
    own = np.diagonal(solve(row_keys @ mean - row_keys @ prior))
    is_written = own >= LEAST_OWN_SHARE
    shares = np.where(is_written, mixture / np.maximum(own, _LEAST_OWN), -1.0)
    # The newest of equals: rows under one key are read alike.
    best = shares.shape[1] - 1 - (shares >= shares.max(1, keepdims=True) - SAME_SHARE)[:, ::-1].argmax(1)
    each = np.arange(count)
    lengths = np.linalg.norm(read, axis=1)
    left = np.linalg.norm(read - mixture @ differences, axis=1) / np.maximum(lengths, _TINY)
    is_reading = (lengths >= _LEAST_LENGTH) & (left <= MOST_RESIDUAL) & is_written[best]
    is_other = ~_same_as(row_keys, best)
    cosines = _unit(keys) @ _unit(row_keys).T
    agreements = _agreements(readings, keys, rows, row_keys, cosines)
    own_rows = indices[best]
    log_cosines = _unit(keys) @ _unit(np.asarray(log.keys, np.float64)).T
    pictures, questions = (
        _picture_cosines(readings, log, log_cosines),
        _question_cosines(readings, log, log_cosines),
    )
    parts = (
        pictures[each, own_rows],
        _largest(pictures, _is_other(log, log.picture_keys, own_rows)),
        questions[each, own_rows],
        _largest(questions, _is_other(log, log.question_keys, own_rows)),
    )
    squares = np.maximum((keys * keys).sum(1), _TINY)
    apart = keys - row_keys[best]
    scope = np.clip(np.asarray(readings.scope, np.float64), 1e-6, 1 - 1e-6)
    evidence = [
        np.clip(shares[each, best], -1, 2),
        np.clip(_largest(shares, is_other), -1, 2),
        own[best],
        cosines[each, best],
        _largest(cosines, is_other),
        _log(((apart @ covariance) * apart).sum(1) / squares),
        agreements[each, best],
        _largest(agreements, is_other),
        _log(((keys @ covariance) * keys).sum(1) / squares),
        np.log(scope / (1 - scope)),
        np.full(count, np.log(len(log.keys))),
        *parts,
        *(np.log(np.maximum(1 - part, _LEAST_DISTANCE)) for part in parts),
    ]
    return Pointed(np.where(is_reading, best, -1), np.stack(evidence, 1))


def _first(state: MemoryArrays) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(state.mean[0]), np.asarray(state.covariance[0])


def _solver(differences: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares with a small ridge: readings [N, C] -> shares [N, E] of the rows of `differences` [E, C]."""
    gram = differences @ differences.T
    gram[np.diag_indices_from(gram)] += _RIDGE * max(float(np.trace(gram)) / len(gram), _TINY)
    return lambda read: np.linalg.solve(gram, differences @ read.T).T


def _agreements(
    readings: Readings, keys: np.ndarray, rows: Rows, row_keys: np.ndarray, cosines: np.ndarray
) -> np.ndarray:
    """Cosines [N, E] of the questions' latents with those of the rows' questions, outside the subspace of the keys.

    The rows of M_ref are orthonormal, so keys have the products of the part inside. A row without a cue gets the cosine
    of the keys.
    """
    latents, cues = np.asarray(readings.latents, np.float64), np.asarray(rows.cues, np.float64)
    outside = [
        np.sqrt(np.maximum((latent * latent).sum(1) - (key * key).sum(1), _TINY))
        for latent, key in ((latents, keys), (cues, row_keys))
    ]
    agreements = (latents @ cues.T - keys @ row_keys.T) / np.maximum(np.outer(*outside), _TINY)
    has_cue = np.abs(cues).max(axis=1, keepdims=True).T > 0
    return np.where(has_cue, np.clip(agreements, -1, 1), cosines)


def _picture_cosines(readings: Readings, log: Rows, cosines: np.ndarray) -> np.ndarray:
    """Cosines [N, L] of the pictures alone: 1 where neither has a picture, -1 where only one of the two has.

    A row whose parts are unknown gets the cosine of the keys.
    """
    asked, told = (np.asarray(part.picture_keys, np.float64) for part in (readings, log))
    has_asked = np.abs(asked).max(1, initial=0) > 0
    alike = np.where(_has_parts(log), np.clip(_unit(asked) @ _unit(told).T, -1, 1), cosines)
    without = np.where(has_asked[:, None] ^ log.has_picture, -1.0, 1.0)
    return np.where(has_asked[:, None] & log.has_picture, alike, without)


def _question_cosines(readings: Readings, log: Rows, cosines: np.ndarray) -> np.ndarray:
    """The same of the words alone."""
    asked, told = (np.asarray(part.question_keys, np.float64) for part in (readings, log))
    return np.where(_has_parts(log), np.clip(_unit(asked) @ _unit(told).T, -1, 1), cosines)


def _has_parts(rows: Rows) -> np.ndarray:
    """bool [E]: whether the log has the keys of a row's parts; older files have none."""
    return np.abs(np.asarray(rows.question_keys)).max(1, initial=0) > 0


def _is_other(log: Rows, parts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """bool [N, L]: which rows have another part [L, K] than row `chosen` [N]; another key where a part is unknown."""
    known = _has_parts(log)
    both_known = known[chosen][:, None] & known
    return np.where(
        both_known, *(~_same_as(np.asarray(keys, np.float64), chosen) for keys in (parts, log.keys))
    )


def _same_as(keys: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """bool [N, L]: which keys [L, K] are key `chosen` [N]; a key itself always is."""
    squares = (keys * keys).sum(1)
    distances = squares[chosen][:, None] + squares - 2 * keys[chosen] @ keys.T
    return distances <= _SAME_KEY * np.maximum(squares[chosen], _TINY)[:, None]


def _largest(values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The largest value [N] of the allowed columns of each row; 0 where there is none."""
    return np.where(allowed.any(1), np.where(allowed, values, -np.inf).max(1, initial=-np.inf), 0.0)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, 1e-6))
