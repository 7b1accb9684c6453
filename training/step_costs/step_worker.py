"""One variant's training steps in a process: `python -m microvlm.training.step_costs.step_worker`.

JSON lines in, JSON lines out, as `bench.speed.backend_worker.serve` says. `load` builds the variant, `step` takes one
optimiser step and times its phases, `peak` times a matrix product, `memory` counts bytes and operations of one step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from microvlm.bench.provenance import memory_of_this_process
from microvlm.bench.speed.backend_worker import serve
from microvlm.bench.training.step_variants import VARIANTS
from microvlm.errors import UserError
from microvlm.training.loop.optimizers import has_bfloat16
from microvlm.training.loop.stage_trainer import step_generator
from microvlm.training.step_costs.variant_task import MeasuredStep, build, positions

_PRODUCT_SIDE = {"cpu": 1536, "cuda": 8192}
_PRODUCTS = 3
"""Products of a sample of the peak; the fastest counts, because other load can only make one slower."""


class StepWorker:
    """Answers requests, one dict each. Raises UserError for what the user can correct."""

    _measured: MeasuredStep
    _device: torch.device
    _variant: str
    _seed: int

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, f"_{request['do']}")(request)
        except torch.OutOfMemoryError:
            raise UserError(
                "there is not enough memory on the device: give a smaller --batch-size or --tokens."
            ) from None

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        self._variant, self._seed = request["variant"], request["seed"]
        if VARIANTS[self._variant].mixed_precision == "bf16" and not has_bfloat16():
            raise UserError("this processor has no bfloat16 arithmetic")
        if request["threads"] is not None:
            torch.set_num_threads(request["threads"])
        self._measured = build(
            self._variant,
            request["model"],
            request["data"],
            request["tokens"],
            request["batch_size"],
            request["device"],
            self._seed,
        )
        trainer = self._measured.trainer
        self._device = trainer.device
        with trainer.precise():
            trainer.task.prepare()
        parameters = list(trainer.module.parameters())
        return {
            "batch_size": self._measured.batch_size,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "device_name": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
        }

    def _step(self, request: dict[str, Any]) -> dict[str, Any]:
        trainer, clock = self._measured.trainer, _Clock(self._device)
        cpu_began = time.process_time()
        batch = self._draw(request["index"])
        data_ms = clock.lap()
        with self._timed_vision() as vision_ms:
            clock.lap()
            loss, _ = trainer.forward(batch)
            forward_ms = clock.lap() - sum(vision_ms)
        trainer.accelerator.backward(loss)
        backward_ms = clock.lap()
        trainer.update()
        step_ms = clock.lap()
        samples, answer_tokens = trainer.task.size(batch)
        return {
            "ms": {
                "data": data_ms,
                "vision": sum(vision_ms),
                "forward": forward_ms,
                "backward": backward_ms,
                "step": step_ms,
            },
            "cpu_ms": (time.process_time() - cpu_began) * 1e3,
            "images": len(batch.pixels),
            "samples": samples,
            "tokens": positions(batch),
            "answer_tokens": answer_tokens,
            "loss": float(loss.detach()),
        }

    def _peak(self, request: dict[str, Any]) -> dict[str, Any]:
        """Operations a second of a square matrix product at the variant's precision."""
        is_half = VARIANTS[self._variant].mixed_precision == "bf16"
        side = _PRODUCT_SIDE[self._device.type]
        generator = torch.Generator(self._device).manual_seed(0)
        dtype = torch.bfloat16 if is_half else torch.float32
        first, second = (
            torch.randn(side, side, generator=generator, device=self._device).to(dtype) for _ in range(2)
        )
        clock, best = _Clock(self._device), float("inf")
        for _ in range(_PRODUCTS):
            clock.lap()
            torch.mm(first, second)
            best = min(best, clock.lap())
        return {"flops_per_s": 2.0 * side**3 / best * 1e3}

    def _memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bytes of live tensors in one step that is not timed, its counted operations, and the process's peak."""
        trainer = self._measured.trainer
        peak = memory_of_this_process()["peak_rss_bytes"]
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        batch = self._draw(request["index"])
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: _count_int8_product})
        with _SavedBytes(trainer.module) as saved, counter:
            loss, _ = trainer.forward(batch)
            trainer.accelerator.backward(loss)
        parameters = list(trainer.module.parameters())
        states = [
            value
            for o in trainer.optimizers
            for state in o.state_dict()["state"].values()
            for value in state.values()
        ]
        figures = {
            "weights_bytes": sum(t.nbytes for t in (*parameters, *trainer.module.buffers())),
            "gradients_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer_bytes": sum(value.nbytes for value in states if isinstance(value, Tensor)),
            "activations_bytes": saved.total,
            "peak_bytes": peak,
            "flops": counter.get_total_flops(),
            "tokens": positions(batch),
        }
        trainer.update()
        return figures

    def _draw(self, index: int) -> Any:
        return self._measured.trainer.task.draw_step(index, step_generator(self._seed, 0, index, 0))

    @contextmanager
    def _timed_vision(self) -> Iterator[list[float]]:
        """Inside the block, milliseconds of every call of the vision encoder are appended to the list."""
        vision: nn.Module = self._measured.trainer.task.model.vision  # type: ignore[attr-defined]
        clock, times = _Clock(self._device), list[float]()
        before = vision.register_forward_pre_hook(lambda *_: clock.restart())
        after = vision.register_forward_hook(lambda *_: times.append(clock.lap()))
        try:
            yield times
        finally:
            before.remove()
            after.remove()


def _count_int8_product(first: Any, second: Any, **_: Any) -> int:
    """Operations of a product of shapes [M, K] and [K, N]; torch's counter does not know the int8 one."""
    return 2 * int(first[0]) * int(first[1]) * int(second[1])


class _Clock:
    """Milliseconds between laps; waits for a GPU to finish what it was given."""

    def __init__(self, device: torch.device):
        self._device = device
        self.restart()

    def restart(self) -> None:
        self._wait()
        self._began = time.perf_counter()

    def lap(self) -> float:
        self._wait()
        now = time.perf_counter()
        milliseconds, self._began = (now - self._began) * 1e3, now
        return milliseconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _SavedBytes:
    """Inside its block, counts the bytes of tensors that autograd keeps for the backward pass, parameters left out.

    A storage that several operations keep counts once.
    """

    def __init__(self, module: nn.Module):
        self.total = 0
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._kept: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            # Held, so that no later tensor gets its address.
            self._kept.append(tensor.detach())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> _SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()


if __name__ == "__main__":
    serve(StepWorker())
