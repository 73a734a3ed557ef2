"""One command that checks and measures everything on a GPU, in stages: `python -m bench.evidence`.

Kernels that never ran may hang, or break the device for their process. So each stage runs in a process of its own
(`child`), which a parent without CUDA watches (`supervise`); what is finished is on the disk at once (`record`).
"""

STAGES = {
    "a": "bench.evidence.ceilings_and_smoke",
    "b": "bench.evidence.values",
    "c": "bench.evidence.quick_bench",
    "d": "bench.evidence.worst_losses",
    "e": "bench.evidence.training",
    "f": "bench.evidence.features",
    "g": "bench.evidence.sanitizer",
}
