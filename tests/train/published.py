"""What was published of each recipe: the training sections of the specification sheets, apart from the recipes."""

from opsin.train.config import read_run
from opsin.train.prepare import published_samples

LLAVA = {"betas": (0.9, 0.999), "wd": 0, "clip": 1, "warmup": 0.03, "epochs": 1}
LAVIS = {"betas": (0.9, 0.98), "wd": 0.05, "clip": None, "warmup": 2000, "start": 1e-6, "side": 224}
LAVIS_TUNED = {"betas": (0.9, 0.999), "wd": 0.05, "clip": None, "warmup": 1000, "start": 1e-8, "epochs": 5}
LAVIS_TUNED |= {"kind": "cosine_of_epochs", "lr": 1e-5}
QWEN = {"betas": (0.9, 0.98), "wd": 0.05, "clip": 1, "eps": 1e-6}
QWEN2 = {"layer_decay": {"vision": 0.95}, "parts": "vision connector"}
INTERNVL = {"betas": (0.9, 0.999), "clip": 1, "epochs": 1, "side": 448}
FIRST, SECOND = {"batch": 2048, "warmup": 100, "tokens": 4096}, {"batch": 1024, "warmup": 0.03}
ALL = "vision connector decoder"
PUBLISHED = {
    "llava/pretrain": {"lr": 2e-3, "batch": 128, "tokens": 2048, "samples": 595_375, "parts": "connector", **LLAVA},
    "llava/finetune": {"lr": 2e-5, "batch": 32, "tokens": 2048, "samples": 157_712, **LLAVA, "epochs": 3},
    "llava/scienceqa": {"lr": 2e-5, "batch": 128, "tokens": 2048, "samples": 12_726, **LLAVA, "epochs": 12},
    "llava-1.5/pretrain": {"lr": 1e-3, "batch": 256, "tokens": 2048, "samples": 558_128, "side": 336, **LLAVA},
    "llava-1.5/finetune": {"lr": 2e-5, "batch": 128, "tokens": 2048, "samples": 665_298, **LLAVA},
    "llava-1.5/finetune-lora": {
        "lr": 2e-4,
        "batch": 128,
        "tokens": 2048,
        "samples": 665_298,
        "part_lr": {"connector": 2e-5},
        "parts": "connector",
        "lora": (128, 256, 0.05, ("decoder",)),
        **LLAVA,
    },
    "llava-1.5/finetune-hd": {
        "lr": 2e-5,
        "batch": 128,
        "samples": 665_298,
        "parts": "connector newline decoder",
        **LLAVA,
    },
    "llava-next/pretrain": {"lr": 1e-3, "batch": 256, "tokens": 2048, "samples": 558_128, "side": 336, **LLAVA},
    "llava-next/finetune": {
        "lr": 2e-5,
        "batch": 128,
        "tokens": 4096,
        "samples": 760_000,
        "part_lr": {"vision": 2e-6},
        "parts": "vision connector newline decoder",
        **LLAVA,
    },
    "blip2/stage1": {
        "lr": 1e-4,
        "min": 1e-5,
        "batch": 1680,
        "steps": 250_000,
        "tokens": 32,
        "samples": 129_000_000,
        "objective": "itc_itm_itg",
        **LAVIS,
    },
    "blip2/stage2-opt": {
        "lr": 1e-4,
        "min": 5e-5,
        "batch": 1920,
        "steps": 80_000,
        "tokens": 64,
        "samples": 129_000_000,
        "parts": "connector",
        **LAVIS,
    },
    "blip2/stage2-flan-t5": {
        "lr": 1e-4,
        "min": 5e-5,
        "batch": 1520,
        "steps": 80_000,
        "tokens": 96,
        "samples": 129_000_000,
        "parts": "connector",
        "captions": "split",
        **LAVIS,
    },
    "blip2/caption-coco": {
        "batch": 256,
        "samples": 566_747,
        "layer_decay": {"vision": 1},
        "parts": "vision connector",
        **LAVIS_TUNED,
    },
    "blip2/vqa": {
        "batch": 128,
        "side": 490,
        "layer_decay": {"vision": 0.95},
        "parts": "vision connector",
        **LAVIS_TUNED,
    },
    "blip2/retrieval-coco": {
        "batch": 224,
        "samples": 566_747,
        "layer_decay": {"vision": 0.95},
        "objective": "itc_itm_itg",
        **LAVIS_TUNED,
    },
    "qwen-vl/pretrain": {
        "lr": 2e-4,
        "min": 1e-6,
        "batch": 30_720,
        "steps": 50_000,
        "warmup": 500,
        "tokens": 512,
        "side": 224,
        "samples": 1_417_400_000,
        **QWEN,
        **QWEN2,
    },
    "qwen-vl/multitask": {
        "lr": 5e-5,
        "min": 1e-5,
        "batch": 4096,
        "steps": 19_000,
        "warmup": 400,
        "tokens": 2048,
        "side": 448,
        "samples": 76_800_000,
        **QWEN,
        **QWEN2,
        "parts": ALL,
    },
    "qwen-vl/chat": {
        "lr": 1e-5,
        "min": 1e-6,
        "batch": 128,
        "steps": 8000,
        "warmup": 3000,
        "tokens": 2048,
        "side": 448,
        "samples": 350_000,
        "layer_decay": {},
        "parts": "connector decoder",
        **QWEN,
    },
    "qwen-vl/finetune": {"lr": 1e-5, "betas": (0.9, 0.95), "wd": 0.1, "warmup": 0.01, "epochs": 5, "tokens": 2048},
    "internvl-1.5/pretrain-26b": {
        "lr": 1e-5,
        "wd": 0.05,
        "drop": 0.2,
        "parts": "vision connector",
        **FIRST,
        **INTERNVL,
    },
    "internvl-1.5/finetune-26b": {
        "lr": 2e-5,
        "wd": 0.05,
        "drop": 0.4,
        "tokens": 4096,
        "parts": ALL,
        **SECOND,
        **INTERNVL,
    },
    "internvl-1.5/pretrain-2b": {"lr": 2e-5, "wd": 0.01, "drop": 0.1, "parts": "vision connector", **FIRST, **INTERNVL},
    "internvl-1.5/finetune-2b": {
        "lr": 4e-5,
        "wd": 0.01,
        "drop": 0.1,
        "tokens": 8192,
        "parts": ALL,
        **SECOND,
        **INTERNVL,
    },
    "internvl-1.5/pretrain-4b": {"lr": 2e-4, "wd": 0.05, "drop": 0, "parts": "connector", **FIRST, **INTERNVL},
    "internvl-1.5/finetune-4b": {
        "lr": 4e-5,
        "wd": 0.05,
        "drop": 0.1,
        "tokens": 8192,
        "parts": ALL,
        **SECOND,
        **INTERNVL,
    },
    # Of these no more was published than what learns; the last is that of the usual code.
    "qwen2-vl/pretrain": {"parts": "vision connector"},
    "qwen2-vl/multitask": {"parts": ALL},
    "qwen2-vl/instruct": {"parts": "connector decoder"},
    "qwen2-vl/finetune": {
        "lr": 1e-5,
        "part_lr": {"vision": 2e-6, "connector": 1e-5},
        "wd": 0.1,
        "warmup": 0.03,
        "batch": 128,
        "parts": ALL,
    },
}


def table_row(name: str) -> str:
    """The line of docs/training.md's table of published stages."""
    (stage,) = read_run(name).stages
    compares = stage.objective == "itc_itm_itg"
    trains = "all but the tower" if compares and "vision" not in stage.trainable else ", ".join(stage.trainable)
    trains = "all" if compares and "vision" in stage.trainable else trains
    trains = "decoder, connector without its last layer" if "connector.queries" in stage.trainable else trains
    trains = f"{trains}, adapters in {', '.join(stage.lora.targets)}" if stage.lora else trains
    least = f" to {stage.schedule.min_lr:g}" if stage.schedule.min_lr else ""
    rates = "".join(f"; {part} {rate:g}" for part, rate in stage.optim.part_lr.items() if rate != stage.optim.lr)
    rates += "".join(f"; {part} x {decay:g} a layer" for part, decay in stage.optim.layer_decay.items() if decay != 1)
    length = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epoch{'s' if stage.epochs != 1 else ''}"
    warmup = stage.schedule.warmup_steps
    rising = f"{stage.schedule.warmup_ratio:.0%}" if warmup is None else f"{warmup:,}"
    count = published_samples(stage)
    cells = (f"`{name}`", trains, f"{stage.optim.lr:g}{least}{rates}", rising, f"{stage.batch.samples:,}", length)
    return f"| {' | '.join((*cells, f'{stage.max_tokens:,}', f'{count:,}' if count else ''))} |"
