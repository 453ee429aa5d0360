"""What values of the config may be: the choices, and the ranges of numbers; keys are dotted."""

from __future__ import annotations

# The backends, and what each can compute in; the first is what ``auto`` means where only one is left.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "torchscript": ("fp32", "bf16", "fp16"),
    "torch_int8": ("int8",),
    "torch_fp8": ("fp8",),
    "onnx": ("fp32", "fp16"),
    "onnx_int8": ("int8",),
    "tensorrt": ("fp16",),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "model.weights": ("pretrained", "random"),
    "backend.name": tuple(PRECISIONS),
    "backend.precision": ("auto", "fp32", "bf16", "fp16", "int8", "fp8"),
    "backend.compile": ("none", "default", "reduce-overhead", "max-autotune"),
    "backend.quantization": ("dynamic", "static"),
    "images.decoder": ("exact", "fast", "scaled", "gpu"),
    "images.exif": ("apply", "ignore"),
    "images.transparency": ("white", "black", "drop"),
    "images.crop_corner": ("floor", "round"),
    "images.repeats": ("once", "each"),
    "loader.isolation": ("process", "none"),
    "labels.scoring": ("auto", "softmax", "sigmoid"),
    "output.dtype": ("float32", "float16"),
    "output.compression": ("zstd", "snappy", "none"),
    "cluster.name": ("inline", "local", "cuda", "address", "slurm", "kubernetes"),
    "report.progress": ("auto", "bar", "plain", "none"),
    "log.format": ("text", "json"),
    "log.level": ("info", "warning", "error"),
}
# Numbers for which the word ``auto`` may be typed; the config keeps 0 for it.
AUTO = "auto"
AUTOMATIC = ("loader.batch_size",)
# Key: (lowest, highest or None).
RANGES: dict[str, tuple[float, float | None]] = {
    "manifest.shard_rows": (1, 1_000_000),
    "manifest.demo_scenes": (1, None),
    "images.max_pixels": (1, 2_000_000_000),
    "images.max_bytes": (1, 2_147_483_647),
    "loader.batch_size": (0, 65_536),
    "loader.workers": (0, 1024),
    "loader.prefetch": (1, 64),
    "backend.streams": (0, 1024),
    "loader.decode_seconds": (0.1, None),
    "loader.decode_memory": (67_108_864, None),
    "loader.read_seconds": (0.1, None),
    "parity.images": (1, 4096),
    "labels.top_k": (1, 1000),
    "output.lease_seconds": (1, None),
    "errors.max_fraction": (0, 1),
    "errors.grace_seconds": (0, None),
    "cluster.workers": (0, 100_000),
    "cluster.cores": (0, 4096),
    "cluster.tries": (1, 100),
    "cluster.wait_seconds": (1, None),
    "cluster.port": (0, 65_535),
    "cluster.dashboard_port": (0, 65_535),
    "cluster.slurm_gpus": (0, 64),
    "cluster.kubernetes_gpus": (0, 64),
    "report.examples": (0, 1000),
    "serve.port": (0, 65_535),
    "serve.wait_ms": (0, 1000),
    "serve.shapes": (1, 8),
    "serve.queue": (1, 1_000_000),
    "serve.requests": (1, 1_000_000),
    "serve.client_requests": (0, 1_000_000),
    "serve.max_images": (1, 65_536),
    "serve.max_texts": (1, 100_000),
    "serve.max_text_chars": (1, 1_000_000),
    "serve.max_body_bytes": (1, 2_147_483_647),
    "serve.held_bytes": (1, None),
    "serve.text_cache_bytes": (0, None),
    "serve.header_seconds": (0.1, None),
    "serve.timeout_seconds": (0.1, None),
    "serve.grace_seconds": (0, None),
}
# What is meant where a place or a list is given to a whole group.
MEANT = {"manifest": "manifest.path", "output": "output.dir", "prompts": "prompts.labels", "labels": "prompts.labels"}
