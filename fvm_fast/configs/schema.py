# SPDX-License-Identifier: Apache-2.0
"""The training configuration: plain dataclasses, one a topic. Field comments are the reference of every option."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """Which pairs are read, and how a batch is made of them.

    Args:
        pairs: ``emoji3`` (bundled), a folder of images, a webdataset tar or a quoted glob of tars.
        styles: drawing styles to train on; of ``emoji3`` only.
        subset: ``concrete``, ``no_flags``, ``all``, or a list of groups such as ``[food-drink]``; of ``emoji3`` only.
        concepts: ``all``, ``train`` or ``held_out``; of ``emoji3`` only.
        source_size: side in pixels at which images are decoded, before augmentation.
        image_size: side in pixels of what the model sees.
        augment: ``anywhere`` (random place, size, rotation, flip, background), ``photo`` (random resized crop, flip) or
            ``aligned`` (none).
        white_share: share of white among the random backgrounds of ``anywhere``.
        color_jitter: strength of random brightness, contrast and saturation, with a quarter of it for hue; 0 is none.
        blur_share: probability that a picture is blurred.
        tokenizer: ``emoji``, ``clip`` or the path of a tokenizer.json.
        context_length: tokens a caption; longer ones are cut.
        captions: ``label``, or more joined with ``+``: ``tags``, ``templates``; of ``emoji3`` only.
        label_share: probability that the main caption is used; else one of the others, where there are any.
        unique_concepts: never put one concept twice in a batch.
        workers: loader processes for images that are not held in memory.
    """

    pairs: str = "emoji3"
    styles: list[str] = field(default_factory=lambda: ["google", "fluent"])
    subset: str | list[str] = "concrete"
    concepts: str = "all"
    source_size: int = 64
    image_size: int = 48
    augment: str = "anywhere"
    white_share: float = 0.0
    color_jitter: float = 0.0
    blur_share: float = 0.0
    tokenizer: str = "emoji"
    context_length: int = 16
    captions: str = "label"
    label_share: float = 1.0
    unique_concepts: bool = True
    workers: int = 2


@dataclass
class ModelConfig:
    """Which network is trained.

    Args:
        name: a name of ``fvm_fast.list_models()``.
        kwargs: sizes and switches handed to its constructor.
    """

    name: str = "clip_vit_emoji"
    kwargs: dict[str, int | float | bool | str | list | None] = field(default_factory=dict)


@dataclass
class ObjectiveConfig:
    """What is minimised.

    Args:
        loss: ``clip`` or ``siglip``.
        label_smoothing: mass spread over the negatives (``clip`` only).
        multi_positive: pairs of one concept in a batch are positives of one another.
    """

    loss: str = "clip"
    label_smoothing: float = 0.0
    multi_positive: bool = False


@dataclass
class OptimizerConfig:
    """AdamW, or Muon with AdamW for what is no hidden matrix.

    Args:
        name: ``adamw`` or ``muon``.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, on AdamW's scale.
        betas: decay of AdamW's running mean and variance of the gradient.
        eps: added to the root of AdamW's variance.
        weight_decay: of matrices and tables; gains, biases and scales are left alone.
        batch_size: pairs a step over all processes together; each micro-batch of accumulation is of this size.
        accumulate: micro-batches whose gradients are averaged before a step.
        clip_grad_norm: largest norm of the gradient; 0 leaves it alone.
    """

    name: str = "adamw"
    lr: float = 1e-3
    muon_lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    batch_size: int = 256
    accumulate: int = 1
    clip_grad_norm: float = 1.0


@dataclass
class ScheduleConfig:
    """Linear warm-up, then a cosine.

    Args:
        steps: optimizer steps in all.
        warmup_steps: steps over which the rate rises from 0 to its peak.
        final_lr_share: share of the peak rate left at the last step.
    """

    steps: int = 1000
    warmup_steps: int = 50
    final_lr_share: float = 0.0


@dataclass
class RunConfig:
    """Where and how the run lives.

    Args:
        name: first part of the run folder's name.
        out: the run folder; ``runs/<name>-<date>`` when not given.
        seed: of weights, order, captions, augmentation and dropout.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``fp32``, or ``bf16`` for autocast.
        compile: hand the objective to torch.compile.
        ema_decay: keep an exponential moving average of the weights with this decay, and evaluate it; 0 keeps none.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept; older ones are deleted.
        log_every: steps between lines of metrics.jsonl.
        print_every: steps between lines on a terminal without a live bar.
        max_minutes: stop (with a checkpoint) after this long; 0 is no limit.
        compare_steps: repeat this many first steps as a plain open_clip loop, and report both.
    """

    name: str = "clip"
    out: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    ema_decay: float = 0.0
    checkpoint_every: int = 200
    keep: int = 2
    log_every: int = 10
    print_every: int = 50
    max_minutes: float = 0.0
    compare_steps: int = 0


@dataclass
class EvalConfig:
    """What is measured after training.

    Args:
        styles: drawing styles of ``emoji3`` for zero-shot classification, best ones never trained on.
        pairs: data set of the user's own pairs for retrieval.
        templates: sentences whose text features are averaged for a concept, such as ``an icon of a {}``.
        queries: free words for the text-to-image search strip.
        seed: of the random places and backgrounds of the ``anywhere`` setting.
        figures: draw PNG pictures into the run folder.
    """

    styles: list[str] = field(default_factory=list)
    pairs: str | None = None
    templates: list[str] = field(default_factory=lambda: ["{}"])
    queries: list[str] = field(default_factory=list)
    seed: int = 0
    figures: bool = True


@dataclass
class TrainConfig:
    """All of it: what ``config.yaml`` of a run folder holds."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
